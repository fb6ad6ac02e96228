// Pages opened from disk may start no worker. The search's worker then runs in a frame of the page: from disk only.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      this.inside = frame.contentWindow
      this.waiting = []
      const doc = this.inside.document
      doc.open()
      doc.write("<!doctype html><script></script>")
      doc.close()
      this.inside.postMessage = data => this.answer(data)
      const script = doc.createElement("script")
      script.src = url
      script.onload = () => {
        this.waiting.forEach(data => this.tell(data))
        this.waiting = null
      }
      doc.body.appendChild(script)
    }
    answer(data) {
      const event = new MessageEvent("message", { data })
      this.dispatchEvent(event)
      if (this.onmessage) this.onmessage(event)
    }
    tell(data) {
      this.inside.dispatchEvent(new this.inside.MessageEvent("message", { data }))
    }
    postMessage(data) {
      if (this.waiting) this.waiting.push(data)
      else this.tell(data)
    }
    terminate() {}
  }
}
