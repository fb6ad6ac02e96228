"use strict";
(() => {
  const items = Array.from(document.querySelectorAll(".item"));
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const text = byId("text"), label = byId("label"), onlyChosen = byId("chosen-only"), onlyUnlike = byId("unlike-only");
  const buttons = [byId("csv"), byId("json")].filter(Boolean);
  const box = (item) => item.querySelector(".chosen");
  const texts = new Map();
  let current = -1;

  function textOf(item) {
    if (!texts.has(item)) texts.set(item, item.textContent.toLowerCase());
    return texts.get(item);
  }
  function chosenRows() {
    return data.rows ? data.rows.filter((_, at) => box(items[at]).checked) : [];
  }
  function updateCount() {
    const shown = items.filter((item) => !item.hidden).length, n = chosenRows().length;
    byId("count").value = `${shown} of ${items.length} shown` + (buttons.length ? `, ${n} chosen` : "");
    for (const button of buttons) button.disabled = !n;
  }
  function filter() {
    const words = text.value.trim().toLowerCase().split(/\s+/).filter(Boolean), tag = label ? label.value : "";
    for (const item of items) {
      item.hidden = (tag !== "" && item.dataset.label !== tag) || (onlyChosen && onlyChosen.checked && !box(item).checked) ||
        (onlyUnlike && onlyUnlike.checked && !("unlike" in item.dataset)) || !words.every((word) => textOf(item).includes(word));
    }
    updateCount();
  }
  function setCurrent(at) {
    if (current >= 0) items[current].classList.remove("current");
    current = at;
    items[current].classList.add("current");
  }
  function goTo(at) {
    setCurrent(at);
    items[current].focus({ preventScroll: true });
    items[current].scrollIntoView({ block: "start" });
  }
  function move(step) {
    for (let at = current + step; at >= 0 && at < items.length; at += step) if (!items[at].hidden) return goTo(at);
  }
  function storeChoices() {
    // Choices remain stored after the page is closed, unless the browser forbids local storage for files.
    try { localStorage.setItem(data.key, JSON.stringify(chosenRows().map((row) => row.row))); } catch { /* not stored */ }
  }
  function mark(item) {
    item.classList.toggle("chosen", box(item).checked);
  }
  function toggleChoice(item) {
    box(item).checked = !box(item).checked;
    mark(item);
    storeChoices();
    updateCount();
  }
  function save(name, kind, content) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([content], { type: kind }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }
  // As scoring.formats.guard_formula: an apostrophe is put before text that a spreadsheet would read as a formula.
  const formula = /^[=+\-@\x00-\x1f\x7f-\x9f]/, number = /^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$/;
  const guardFormula = (value) => typeof value === "string" && formula.test(value) && !number.test(value) ? `'${value}` : String(value);
  const quote = (text) => /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  const cell = (value) => value === null ? "" : quote(guardFormula(value));

  document.addEventListener("keydown", (event) => {
    const at = event.target instanceof Element ? event.target : document.body;
    const typing = at.matches("input:not([type=checkbox]), select, textarea, button, summary, a");
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && at === text) { text.value = ""; filter(); text.blur(); return; }
    if (typing) return;
    if (event.key === "j") move(1);
    else if (event.key === "k") move(-1);
    else if (event.key === "/") text.focus();
    else if (buttons.length && current >= 0 && (event.key === "x" || (event.key === " " && !at.matches("input")))) toggleChoice(items[current]);
    else return;
    event.preventDefault();
  });
  document.addEventListener("focusin", (event) => {
    const item = event.target.closest(".item"), at = items.indexOf(item);
    if (item && at !== current) setCurrent(at);
  });
  document.addEventListener("change", (event) => {
    if (event.target.classList.contains("chosen")) {
      mark(event.target.closest(".item"));
      storeChoices();
      updateCount();
    } else filter();
  });
  text.addEventListener("input", filter);
  if (buttons.length) {
    byId("csv").addEventListener("click", () => {
      const lines = [data.fields, ...chosenRows().map((row) => data.fields.map((name) => row[name]))];
      save("chosen.csv", "text/csv", lines.map((line) => line.map(cell).join(",") + "\n").join(""));
    });
    byId("json").addEventListener("click", () => save("chosen.json", "application/json", JSON.stringify(chosenRows(), null, 2) + "\n"));
    let stored = [];
    try { stored = JSON.parse(localStorage.getItem(data.key)) || []; } catch { /* not stored */ }
    data.rows.forEach((row, at) => {
      if (stored.includes(row.row)) { box(items[at]).checked = true; mark(items[at]); }
    });
  }
  updateCount();
})();
