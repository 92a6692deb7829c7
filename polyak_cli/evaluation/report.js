"use strict";
const body = document.querySelector("#scores tbody");
const heads = [...document.querySelectorAll("#scores th")];
const all = document.querySelector("#all");
const MOST = 10;
// Without this script, every row is shown.
const fold = () => [...body.rows].forEach((row, k) => { row.hidden = !all.hidden && k >= MOST; });
const value = (row, k) => {
  const cell = row.cells[k], text = cell.dataset.value ?? cell.textContent;
  const number = Number(text);
  return text === "" ? null : Number.isNaN(number) ? text : number;
};
heads.forEach((head, k) => head.querySelector("button").addEventListener("click", () => {
  const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  heads.forEach((other) => other.setAttribute("aria-sort", "none"));
  head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
  const order = (a, b) => {
    const x = value(a, k), y = value(b, k);
    if (x === null || y === null) return (x === null) - (y === null);
    return sign * (typeof x === typeof y && typeof x === "number" ? x - y
      : String(x).localeCompare(String(y)));
  };
  body.append(...[...body.rows].sort(order));
  fold();
}));
all.addEventListener("click", () => { all.hidden = true; fold(); });
all.hidden = body.rows.length <= MOST;
fold();
