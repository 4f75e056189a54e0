"use strict";
const data = JSON.parse(document.getElementById("report-data").textContent);

// sortable tables
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = heading.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const isDescending = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", isDescending ? "descending" : "ascending");
      const valueOf = (row) => row.cells[column].dataset.value;
      const compare = column === 0
        ? (a, b) => valueOf(a).localeCompare(valueOf(b), undefined, { numeric: true })
        : (a, b) => Number(valueOf(a)) - Number(valueOf(b));
      const rows = [...table.tBodies[0].rows].sort(compare);
      table.tBodies[0].append(...(isDescending ? rows.reverse() : rows));
    });
  });
}

// images of a confusion matrix cell
const panel = document.getElementById("cell");
let pressed = null;
for (const button of document.querySelectorAll("button[data-cell]")) {
  button.setAttribute("aria-pressed", "false");
  button.addEventListener("click", () => {
    if (pressed) pressed.setAttribute("aria-pressed", "false");
    if (pressed === button) {
      pressed = null;
      panel.hidden = true;
      return;
    }
    pressed = button;
    button.setAttribute("aria-pressed", "true");
    const cell = data.cells[button.dataset.cell];
    const title = document.createElement("h3");
    title.textContent = `${cell.label} predicted as ${cell.prediction}: ${cell.n}`;
    const list = document.createElement("ul");
    for (const number of cell.images) {
      const { path, src } = data.images[number];
      const item = document.createElement("li");
      if (src) {
        const image = document.createElement("img");
        image.className = "small";
        image.src = src;
        image.alt = "";
        item.append(image);
      }
      item.append(path);
      list.append(item);
    }
    panel.hidden = false; // before filling it: screen readers ignore changes of hidden content
    panel.replaceChildren(title, list);
    if (cell.n > cell.images.length) {
      const more = document.createElement("p");
      more.className = "more";
      more.textContent = `the ${cell.images.length} most confident of ${cell.n}`;
      panel.append(more);
    }
  });
}

// label review: choices become a table for pixelplay train --relabel
const save = document.getElementById("save");
if (save) {
  const saved = document.getElementById("saved");
  const items = [...document.querySelectorAll("li[data-issue]")];
  const FILL_AT_ONCE = 50; // classes; longer lists are filled when they are opened
  let isSaved = true;
  let isStored = true;
  const fill = (choice) => {
    if (choice.options.length === 1) choice.append(...data.classes.map((name, n) => new Option(name, n)));
  };
  const chosenOf = (item) => {
    const input = item.querySelector("input:checked");
    const needsClass = input && input.value === "other" && item.querySelector("select").value === "";
    return needsClass ? null : input;
  };
  const labelOf = (item) => {
    const issue = data.label_issues[Number(item.dataset.issue)];
    const action = chosenOf(item).value;
    if (action === "keep") return issue.label;
    if (action === "suggested") return issue.suggested;
    if (action === "other") return data.classes[Number(item.querySelector("select").value)];
    return "";
  };
  // spreadsheets run cells that begin like a formula
  const isFormula = (text) => /^[=+\-@\t\r]/.test(text);
  const quoted = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const safePath = (path) => (isFormula(path) ? `./${path}` : path);
  const safeLabel = (label) => (isFormula(label.replace(/^'+/, "")) ? `'${label}` : label);
  // Python writes each invalid UTF-8 byte of a file name as a lone surrogate; turn it back into that byte
  const INVALID_BYTE = /((?<![\ud800-\udbff])[\udc80-\udcff])/;
  const encoder = new TextEncoder();
  const bytesOf = (text) =>
    text.split(INVALID_BYTE).map((part, i) => (i % 2 ? new Uint8Array([part.charCodeAt(0) & 0xff]) : encoder.encode(part)));
  // the browser keeps choices between visits, by position, without names
  const key = `pixelplay review ${data.id}`;
  const store = () => {
    const choices = items.flatMap((item) => {
      const input = chosenOf(item);
      return input ? [[item.dataset.issue, input.value, item.querySelector("select").value]] : [];
    });
    try {
      localStorage.setItem(key, JSON.stringify({ choices, isSaved }));
      isStored = true;
    } catch {
      isStored = false;
    }
  };
  const restore = () => {
    try {
      const stored = JSON.parse(localStorage.getItem(key));
      for (const [n, action, choice] of stored.choices) {
        items[n].querySelector(`input[value=${action}]`).checked = true;
        if (choice !== "") fill(items[n].querySelector("select"));
        items[n].querySelector("select").value = choice;
      }
      isSaved = stored.isSaved;
    } catch { /* nothing stored, or not by this page */ }
  };
  const show = () => {
    const n = items.filter(chosenOf).length;
    save.disabled = n === 0;
    for (const item of items) item.querySelector("button.undo").hidden = !item.querySelector("input:checked");
    const nOpen = items.filter((item) => item.querySelector("input:checked")).length - n;
    const texts = [`${n} reviewed`];
    if (nOpen) texts.push(`${nOpen} without a class`);
    if (n) texts.push(isSaved ? "saved" : "not saved");
    saved.textContent = texts.join(", ");
  };
  const update = () => {
    isSaved = false;
    store();
    show();
  };
  for (const item of items) {
    for (const input of item.querySelectorAll("input")) input.addEventListener("change", update);
    const choice = item.querySelector("select");
    if (data.classes.length <= FILL_AT_ONCE) fill(choice);
    for (const event of ["pointerdown", "focus"]) choice.addEventListener(event, () => fill(choice));
    choice.addEventListener("change", () => {
      item.querySelector("input[value=other]").checked = true;
      update();
    });
    item.querySelector("button.undo").addEventListener("click", () => {
      const input = item.querySelector("input:checked");
      input.checked = false;
      choice.value = "";
      update();
      input.focus();
    });
  }
  restore();
  show();

  // pages of label issues, of one class or all; without scripts, the rest is behind a click
  const others = document.getElementById("other-issues");
  if (others) {
    const list = document.getElementById("issue-list");
    const className = document.getElementById("issue-class");
    const [previous, next] = ["previous-issues", "next-issues"].map((id) => document.getElementById(id));
    const perPage = list.children.length;
    let first = 0;
    list.append(...items);
    others.remove();
    for (const hidden of document.querySelectorAll("p.filter, p.pages")) hidden.hidden = false;
    const concerns = (item, name) => {
      const issue = data.label_issues[Number(item.dataset.issue)];
      return issue.label === name || issue.suggested === name;
    };
    data.classes.forEach((name, n) => {
      const count = items.filter((item) => concerns(item, name)).length;
      if (count) className.append(new Option(`${name} (${count})`, n));
    });
    const turn = () => {
      const name = className.value === "" ? null : data.classes[Number(className.value)];
      const found = name === null ? items : items.filter((item) => concerns(item, name));
      const last = Math.min(first + perPage, found.length);
      const shown = new Set(found.slice(first, last));
      for (const item of items) item.hidden = !shown.has(item);
      document.getElementById("issue-range").textContent = `${first + 1}–${last} of ${found.length}`;
      previous.disabled = first === 0;
      next.disabled = last === found.length;
    };
    const go = (position) => {
      first = position;
      turn();
      list.focus({ preventScroll: true });
      list.scrollIntoView();
    };
    className.addEventListener("change", () => {
      first = 0;
      turn();
    });
    previous.addEventListener("click", () => go(first - perPage));
    next.addEventListener("click", () => go(first + perPage));
    turn();
  }
  save.addEventListener("click", () => {
    const labels = new Map(data.corrections.map(({ path, corrected }) => [path, corrected ?? ""]));
    const reviewed = items.filter(chosenOf);
    for (const item of reviewed) labels.set(data.label_issues[Number(item.dataset.issue)].path, labelOf(item));
    const rows = [...labels].map(([path, label]) => `${quoted(safePath(path))},${quoted(safeLabel(label))}\r\n`);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(["path,label\r\n", ...rows.flatMap(bytesOf)], { type: "text/csv" }));
    link.download = "corrections.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    isSaved = true;
    store();
    const earlier = rows.length - reviewed.length;
    saved.textContent = `${reviewed.length} saved` + (earlier ? `, with ${earlier} earlier corrections` : "");
  });
  addEventListener("beforeunload", (event) => {
    if (!isSaved && !isStored) event.preventDefault();
  });
}
