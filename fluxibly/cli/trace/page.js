"use strict";
// The table sorts, filters and finds its rows; links unfold their cards; folds of earlier messages copy them.
// The address keeps the state: #sort=-duration&outcome=failed&search=paris, or #call-3.
(() => {
  const table = document.getElementById("calls");
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const rows = [...body.rows];
  const form = document.getElementById("controls");
  const count = form.querySelector("output");
  const cards = new Map(rows.map((row) => [row, target(row).closest("article")]));
  const texts = new Map();
  let sorted = "time";

  function target(row) {
    return document.getElementById(row.querySelector("a").hash.slice(1));
  }

  function text(row) {
    if (!texts.has(row)) {
      texts.set(row, `${row.textContent} ${target(row).textContent}`.toLowerCase());
    }
    return texts.get(row);
  }

  function filter() {
    const wanted = form.search.value.trim().toLowerCase();
    const outcome = form.outcome.value;
    let shown = 0;
    const visible = new Set();
    for (const row of rows) {
      row.hidden = (outcome && row.dataset.outcome !== outcome) || (wanted && !text(row).includes(wanted));
      if (!row.hidden) {
        shown += 1;
        visible.add(cards.get(row));
      }
    }
    for (const card of cards.values()) card.hidden = !visible.has(card);
    count.textContent = shown === rows.length ? `${shown} shown` : `${shown} of ${rows.length} shown`;
  }

  function sort() {
    const down = sorted.startsWith("-");
    const key = down ? sorted.slice(1) : sorted;
    const column = heads.findIndex((head) => head.dataset.key === key);
    if (column < 0) return;
    for (const head of heads) head.setAttribute("aria-sort", "none");
    heads[column].setAttribute("aria-sort", down ? "descending" : "ascending");
    const numeric = heads[column].dataset.key !== "name" && heads[column].dataset.key !== "outcome";
    const value = (row) => {
      const cell = row.cells[column];
      if (!numeric) return cell.textContent;
      return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
    };
    const order = rows.map((row, place) => ({ row, place, value: value(row) }));
    const compare = new Intl.Collator("en", { numeric: true }).compare;
    order.sort((one, other) => {
      if (one.value === null || other.value === null) {
        // What is not known comes last, in either direction.
        return (one.value === null) - (other.value === null) || one.place - other.place;
      }
      const sign = numeric ? one.value - other.value : compare(one.value, other.value);
      return (down ? -sign : sign) || one.place - other.place;
    });
    body.append(...order.map((each) => each.row));
  }

  function remember() {
    const state = new URLSearchParams();
    if (sorted !== "time") state.set("sort", sorted);
    if (form.outcome.value) state.set("outcome", form.outcome.value);
    if (form.search.value) state.set("search", form.search.value);
    history.replaceState(null, "", `#${state}`);
  }

  function follow() {
    const hash = location.hash.slice(1);
    if (/^(call|m)-\d+$/.test(hash)) {
      const place = document.getElementById(hash);
      if (!place) return;
      place.closest("article").hidden = false;
      place.closest("article").querySelector("details").open = true;
      place.scrollIntoView();
      return;
    }
    const state = new URLSearchParams(hash);
    sorted = state.get("sort") || sorted;
    form.outcome.value = state.get("outcome") || form.outcome.value;
    form.search.value = state.get("search") || form.search.value;
  }

  function copyEarlier(fold) {
    if (!fold.open || fold.dataset.messages === undefined) return;
    const chat = document.createElement("div");
    chat.className = "chat";
    for (const run of fold.dataset.messages.split(" ")) {
      const [first, last] = run.split("-").map(Number);
      for (let number = first; number <= last; number += 1) {
        const copy = document.getElementById(`m-${number}`).cloneNode(true);
        copy.removeAttribute("id");
        chat.append(copy);
      }
    }
    fold.querySelector("p").replaceWith(chat);
    delete fold.dataset.messages;
  }

  for (const head of heads) {
    head.firstElementChild.addEventListener("click", () => {
      sorted = sorted === head.dataset.key ? `-${sorted}` : head.dataset.key;
      sort();
      remember();
    });
  }
  form.addEventListener("input", () => {
    filter();
    remember();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  document.addEventListener("toggle", (event) => copyEarlier(event.target), { capture: true });
  document.addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#"]');
    if (link && link.hash === location.hash) follow(); // a second click on a link changes no address
  });
  window.addEventListener("hashchange", () => {
    follow();
    sort();
    filter();
  });
  document.querySelectorAll(".earlier[open]").forEach(copyEarlier);
  form.hidden = false;
  follow();
  sort();
  filter();
})();
