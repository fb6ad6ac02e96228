"use strict";
// Keys for lists of rows to check. Pages work without this script.
(() => {
  const items = () => Array.from(document.querySelectorAll(".item.sus"));
  let current = null, isByKey = false, isBusy = false, hadFocus = false;

  function goTo(item) {
    if (!item) return;
    if (current) current.classList.remove("current");
    current = item;
    current.classList.add("current");
    current.focus({ preventScroll: true });
    current.scrollIntoView({ block: "start" });
  }
  function move(step) {
    const all = items(), at = current && current.isConnected ? all.indexOf(current) : -1;
    goTo(all[Math.max(0, Math.min(all.length - 1, at + step))]);
  }
  function updateCount() {
    const all = items(), count = document.getElementById("count");
    if (count && all.length) count.value = `${all.filter((item) => item.querySelector("[aria-pressed=true]")).length} of ${all.length} on this page decided`;
  }

  // Progress is replaced while a job runs, so a screen reader is told its begin and its end here.
  function updateStatus() {
    const label = document.querySelector("#progress label");
    if (Boolean(label) === isBusy) return;
    isBusy = Boolean(label);
    document.getElementById("status").textContent = isBusy ? label.textContent : "The result is complete.";
    const result = document.getElementById("result");
    if (!isBusy && hadFocus && result) { result.tabIndex = -1; result.focus({ preventScroll: true }); }
  }

  document.addEventListener("keydown", (event) => {
    const at = event.target instanceof Element ? event.target : document.body;
    if (event.ctrlKey || event.metaKey || event.altKey || at.matches("input, select, textarea, summary")) return;
    const button = current && /^[0-9]$/.test(event.key) ? current.querySelector(`[data-key="${event.key}"]`) : null;
    if (event.key === "j") move(1);
    else if (event.key === "k") move(-1);
    else if (button) { isByKey = true; button.click(); }
    else return;
    event.preventDefault();
  });
  document.addEventListener("focusin", (event) => {
    const item = event.target.closest(".item.sus");
    if (!item || item === current) return;
    if (current) current.classList.remove("current");
    current = item;
    item.classList.add("current");
  });
  // After a decision by a key, the next row is current.
  document.addEventListener("htmx:beforeSwap", () => { hadFocus = Boolean(document.activeElement.closest("#progress")); });
  document.addEventListener("htmx:afterSwap", () => {
    updateCount();
    updateStatus();
    const decided = current && current.isConnected && current.querySelector(".decide [aria-pressed=true]");
    if (isByKey && decided) move(1);
    else if (current && current.isConnected && document.activeElement === document.body) current.focus({ preventScroll: true });
    isByKey = false;
  });
  // Addresses of forms without the fields that are empty.
  document.addEventListener("formdata", (event) => {
    if (event.target.method !== "get") return;
    for (const [name, value] of Array.from(event.formData)) if (value === "") event.formData.delete(name);
  });
  updateCount();
  updateStatus();
})();
