"use strict";
const island = JSON.parse(document.getElementById("island").textContent);

// tables that are sorted by a press on a heading
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = heading.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const isDown = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", isDown ? "descending" : "ascending");
      const valueOf = (row) => row.cells[column].dataset.value;
      const compare = column === 0
        ? (a, b) => valueOf(a).localeCompare(valueOf(b), undefined, { numeric: true })
        : (a, b) => Number(valueOf(a)) - Number(valueOf(b));
      const rows = [...table.tBodies[0].rows].sort(compare);
      table.tBodies[0].append(...(isDown ? rows.reverse() : rows));
    });
  });
}

// photographs of a cell of the confusion matrix
const shown = document.getElementById("cell");
let pressed = null;
for (const button of document.querySelectorAll("button[data-cell]")) {
  button.setAttribute("aria-pressed", "false");
  button.addEventListener("click", () => {
    if (pressed) pressed.setAttribute("aria-pressed", "false");
    if (pressed === button) {
      pressed = null;
      shown.hidden = true;
      return;
    }
    pressed = button;
    button.setAttribute("aria-pressed", "true");
    const cell = island.cells[button.dataset.cell];
    const title = document.createElement("h3");
    title.textContent = `${cell.given}, answered as ${cell.label}: ${cell.n}`;
    const list = document.createElement("ul");
    for (const number of cell.pictures) {
      const { path, src } = island.pictures[number];
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
    shown.hidden = false; // first: what is filled while hidden is not read out
    shown.replaceChildren(title, list);
    if (cell.n > cell.pictures.length) {
      const more = document.createElement("p");
      more.className = "more";
      more.textContent = `the ${cell.pictures.length} surest of ${cell.n}`;
      shown.append(more);
    }
  });
}

// corrections: what is marked becomes a table that pixelplay train --relabel takes
const save = document.getElementById("save");
if (save) {
  const saved = document.getElementById("saved");
  const items = [...document.querySelectorAll("li[data-suspect]")];
  const AT_ONCE = 50;
  let isSaved = true;
  let isKept = true;
  // each list of classes is filled when it is looked at: with many of them, all at once would be too much
  const fill = (choice) => {
    if (choice.options.length === 1) choice.append(...island.classes.map((name, n) => new Option(name, n)));
  };
  const markedOf = (item) => {
    const input = item.querySelector("input:checked");
    const isOpen = input && input.value === "other" && item.querySelector("select").value === "";
    return isOpen ? null : input;
  };
  const labelOf = (item) => {
    const suspect = island.suspects[Number(item.dataset.suspect)];
    const way = markedOf(item).value;
    if (way === "right") return suspect.label;
    if (way === "proposed") return suspect.suggested;
    if (way === "other") return island.classes[Number(item.querySelector("select").value)];
    return "";
  };
  const isFormula = (text) => /^[=+\-@\t\r]/.test(text);
  const quoted = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const safePath = (path) => (isFormula(path) ? `./${path}` : path);
  const safeLabel = (label) => (isFormula(label.replace(/^'+/, "")) ? `'${label}` : label);
  // a name that is no valid UTF-8 comes as Python has it, each odd byte as a lone surrogate, and goes as it was
  const ODD_BYTE = /((?<![\ud800-\udbff])[\udc80-\udcff])/;
  const encoder = new TextEncoder();
  const bytesOf = (text) =>
    text.split(ODD_BYTE).map((part, i) => (i % 2 ? new Uint8Array([part.charCodeAt(0) & 0xff]) : encoder.encode(part)));
  // marks outlive the page where the browser lets it keep something: places and choices, no names
  const key = `pixelplay marks ${island.id}`;
  const keep = () => {
    const marks = items.flatMap((item) => {
      const input = markedOf(item);
      return input ? [[item.dataset.suspect, input.value, item.querySelector("select").value]] : [];
    });
    try {
      localStorage.setItem(key, JSON.stringify({ marks, isSaved }));
      isKept = true;
    } catch {
      isKept = false;
    }
  };
  const bringBack = () => {
    try {
      const kept = JSON.parse(localStorage.getItem(key));
      for (const [n, way, choice] of kept.marks) {
        items[n].querySelector(`input[value=${way}]`).checked = true;
        if (choice !== "") fill(items[n].querySelector("select"));
        items[n].querySelector("select").value = choice;
      }
      isSaved = kept.isSaved;
    } catch { /* nothing was kept, or nothing of ours */ }
  };
  const show = () => {
    const n = items.filter(markedOf).length;
    save.disabled = n === 0;
    for (const item of items) item.querySelector("button.undo").hidden = !item.querySelector("input:checked");
    const nOpen = items.filter((item) => item.querySelector("input:checked")).length - n;
    const told = n || nOpen ? [`${n} marked`] : ["nothing is marked"];
    if (nOpen) told.push(`${nOpen} without a class`);
    if (n) told.push(isSaved ? "saved" : "not saved yet");
    saved.textContent = told.join(", ");
  };
  const update = () => {
    isSaved = false;
    keep();
    show();
  };
  for (const item of items) {
    for (const input of item.querySelectorAll("input")) input.addEventListener("change", update);
    const choice = item.querySelector("select");
    if (island.classes.length <= AT_ONCE) fill(choice);
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
  bringBack();
  show();
  save.addEventListener("click", () => {
    const labels = new Map(island.corrections.map(({ path, corrected }) => [path, corrected ?? ""]));
    const marked = items.filter(markedOf);
    for (const item of marked) labels.set(island.suspects[Number(item.dataset.suspect)].path, labelOf(item));
    const rows = [...labels].map(([path, label]) => `${quoted(safePath(path))},${quoted(safeLabel(label))}\r\n`);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(["path,label\r\n", ...rows.flatMap(bytesOf)], { type: "text/csv" }));
    link.download = "corrections.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    isSaved = true;
    keep();
    const earlier = rows.length - marked.length;
    saved.textContent = `saved ${marked.length}` + (earlier ? `, and ${earlier} corrections from before` : "");
  });
  addEventListener("beforeunload", (event) => {
    if (!isSaved && !isKept) event.preventDefault();
  });
}
