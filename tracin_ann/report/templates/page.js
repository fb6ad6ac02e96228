"use strict";
(() => {
  const items = Array.from(document.querySelectorAll(".item"));
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const text = byId("text"), label = byId("label"), only = byId("chosen-only"), strange = byId("strange-only");
  const buttons = [byId("csv"), byId("json")].filter(Boolean);
  const box = (item) => item.querySelector(".chosen");
  const words = new Map();
  let now = -1;

  function said(item) {
    if (!words.has(item)) words.set(item, item.textContent.toLowerCase());
    return words.get(item);
  }
  function chosen() {
    return data.rows ? data.rows.filter((_, at) => box(items[at]).checked) : [];
  }
  function count() {
    const shown = items.filter((item) => !item.hidden).length, n = chosen().length;
    byId("count").value = `${shown} of ${items.length} shown` + (buttons.length ? `, ${n} chosen` : "");
    for (const button of buttons) button.disabled = !n;
  }
  function filter() {
    const wanted = text.value.trim().toLowerCase().split(/\s+/).filter(Boolean), tag = label ? label.value : "";
    for (const item of items) {
      item.hidden = (tag !== "" && item.dataset.label !== tag) || (only && only.checked && !box(item).checked) ||
        (strange && strange.checked && !("strange" in item.dataset)) || !wanted.every((word) => said(item).includes(word));
    }
    count();
  }
  function go(to) {
    if (now >= 0) items[now].classList.remove("now");
    now = to;
    items[now].classList.add("now");
    items[now].focus({ preventScroll: true });
    items[now].scrollIntoView({ block: "start" });
  }
  function move(step) {
    for (let at = now + step; at >= 0 && at < items.length; at += step) if (!items[at].hidden) return go(at);
  }
  function keep() {
    // Kept beside the file, so that a page that is closed and opened again goes on; where the browser forbids it, not.
    try { localStorage.setItem(data.key, JSON.stringify(chosen().map((row) => row.row))); } catch { /* none */ }
  }
  function mark(item) {
    item.classList.toggle("chosen", box(item).checked);
  }
  function choose(item) {
    box(item).checked = !box(item).checked;
    mark(item);
    keep();
    count();
  }
  function save(name, kind, content) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([content], { type: kind }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }
  // As formats.guarded: what a spreadsheet would take for a formula begins with an apostrophe.
  const formula = /^[=+\-@\x00-\x1f\x7f-\x9f]/, number = /^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$/;
  const guarded = (value) => typeof value === "string" && formula.test(value) && !number.test(value) ? `'${value}` : String(value);
  const quoted = (told) => /[",\r\n]/.test(told) ? `"${told.replaceAll('"', '""')}"` : told;
  const cell = (value) => value === null ? "" : quoted(guarded(value));

  document.addEventListener("keydown", (event) => {
    const at = event.target instanceof Element ? event.target : document.body;
    const typing = at.matches("input:not([type=checkbox]), select, textarea, button, summary, a");
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && at === text) { text.value = ""; filter(); text.blur(); return; }
    if (typing) return;
    if (event.key === "j") move(1);
    else if (event.key === "k") move(-1);
    else if (event.key === "/") text.focus();
    else if (buttons.length && now >= 0 && (event.key === "x" || (event.key === " " && !at.matches("input")))) choose(items[now]);
    else return;
    event.preventDefault();
  });
  document.addEventListener("focusin", (event) => {
    const item = event.target.closest(".item"), at = items.indexOf(item);
    if (item && at !== now) {
      if (now >= 0) items[now].classList.remove("now");
      now = at;
      item.classList.add("now");
    }
  });
  document.addEventListener("change", (event) => {
    if (event.target.classList.contains("chosen")) {
      mark(event.target.closest(".item"));
      keep();
      count();
    } else filter();
  });
  text.addEventListener("input", filter);
  if (buttons.length) {
    byId("csv").addEventListener("click", () => {
      const lines = [data.fields, ...chosen().map((row) => data.fields.map((name) => row[name]))];
      save("chosen.csv", "text/csv", lines.map((line) => line.map(cell).join(",") + "\n").join(""));
    });
    byId("json").addEventListener("click", () => save("chosen.json", "application/json", JSON.stringify(chosen(), null, 2) + "\n"));
    let before = [];
    try { before = JSON.parse(localStorage.getItem(data.key)) || []; } catch { /* none */ }
    data.rows.forEach((row, at) => {
      if (before.includes(row.row)) { box(items[at]).checked = true; mark(items[at]); }
    });
  }
  count();
})();
