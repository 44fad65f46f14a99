
"use strict";
// Tables are sorted by a click on a heading, or Enter or Space on it: upwards, then downwards. Nothing is asked for.
const collator = new Intl.Collator("en", { numeric: true });

function by(row, column) {
  const cell = row.cells[column];
  return cell.dataset.by ?? cell.textContent;
}

function compare(a, b, numbers) {
  return numbers ? Number(a) - Number(b) : collator.compare(a, b);
}

function sort(table, head, column) {
  const up = head.getAttribute("aria-sort") !== "ascending";
  const numbers = head.classList.contains("number");
  const rows = [...table.tBodies[0].rows].map((row) => [by(row, column), row]);
  // what is missing, or no number, stays below
  const there = ([value]) => value !== "" && !(numbers && Number.isNaN(Number(value)));
  const known = rows.filter(there).sort(([a], [b]) => (up ? 1 : -1) * compare(a, b, numbers));
  table.tBodies[0].append(...[...known, ...rows.filter((pair) => !there(pair))].map(([, row]) => row));
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
}

for (const table of document.querySelectorAll("table")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(table, head, column));
    head.append(button);
  });
}

// On paper all that is folded is shown.
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  for (const one of opened) one.open = true;
});
addEventListener("afterprint", () => {
  for (const one of opened) one.open = false;
});
