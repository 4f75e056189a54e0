"use strict";
const byId = (id) => document.getElementById(id);
const SHOWN_CLASSES = 6;
const PER_REQUEST = 16; // images, so that answers arrive while the others wait
const RETRIES = 20;
const DECIMALS = 6; // as in predictions.csv
const TOKEN = "pixelplay token";

let model = null;
let shown = null; // the item in the result section
const items = []; // {file, row, url, heat: Map(class → url)}
const waiting = []; // files that were chosen before the model was known

// requests
function readToken() {
  try {
    return sessionStorage.getItem(TOKEN);
  } catch {
    return null;
  }
}
let token = readToken();

async function request(path, body) {
  for (let attempt = 0; ; attempt += 1) {
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
    const response = await fetch(path, body ? { method: "POST", body, headers } : { headers });
    if (response.ok) return response;
    if (response.status === 429 && attempt < RETRIES) {
      const seconds = Number(response.headers.get("Retry-After")) || 1;
      await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
      continue;
    }
    if (response.status === 401) askForToken();
    const problem = await response.json().catch(() => ({}));
    throw new Error(problem.detail || `the server answered with status ${response.status}`);
  }
}

function formOf(files) {
  const form = new FormData();
  for (const file of files) form.append("images", file, file.name);
  return form;
}

function report(text, hasFailed = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("failed", hasFailed);
}

function askForToken() {
  byId("about").textContent = "";
  byId("entry").hidden = false;
  byId("token").focus();
}

async function loadModel() {
  try {
    model = await (await request("v1/model")).json();
  } catch (error) {
    if (byId("entry").hidden || token) report(`Could not load the model: ${error.message}.`, true);
    return;
  }
  byId("entry").hidden = true;
  report("");
  const n = model.classes.length;
  const names = model.classes.slice(0, 10).join(", ") + (n > 10 ? ` and ${n - 10} more` : "");
  byId("about").textContent = `${n} classes: ${names}.`;
  byId("explained").replaceChildren(...model.classes.map((name) => new Option(name, name)));
  if (waiting.length) classify(waiting.splice(0));
}

byId("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  token = byId("token").value.trim();
  try {
    sessionStorage.setItem(TOKEN, token);
  } catch { /* kept until the page is left */ }
  loadModel();
});

// images
function* groupsOf(files) {
  const limit = 0.9 * 1e6 * model.limits.max_upload_mb;
  let group = [];
  let bytes = 0;
  for (const file of files) {
    if (group.length && (bytes + file.size > limit || group.length >= Math.min(PER_REQUEST, model.limits.max_images))) {
      yield group;
      group = [];
      bytes = 0;
    }
    group.push(file);
    bytes += file.size;
  }
  if (group.length) yield group;
}

let queue = Promise.resolve(); // one request after the other, in the order of the images
function classify(files) {
  if (!files.length) return;
  if (!model) {
    waiting.push(...files);
    return;
  }
  queue = queue.then(() => send(files));
}

async function send(files) {
  let done = 0;
  let failure = null;
  report(`Classifying ${files.length === 1 ? "the image" : `${files.length} images`} …`);
  for (const group of groupsOf(files)) {
    try {
      const answer = await (await request("v1/predict", formOf(group))).json();
      const added = group.map((file, i) => add(file, answer.predictions[i]));
      if (!done) show(added[0]);
      done += group.length;
      if (done < files.length) report(`Classified ${done} of ${files.length} images …`);
    } catch (error) {
      failure = error;
      break;
    }
  }
  if (failure) report(`Classified ${done} of ${files.length} images; then: ${failure.message}.`, true);
  else if (files.length === 1) report(summary(items.at(-1).row));
  else report(`Classified ${done} images.`);
}

const percent = (p) => `${(100 * p).toFixed(1)} %`;
const summary = (row) =>
  row.prediction === null ? `Could not read ${row.name}: ${row.error}.` : `${row.prediction}, ${percent(row.probability)}.`;
const isUnusual = (row) => row.novelty !== null && row.novelty >= model.novelty_threshold;

function add(file, answered) {
  const row = { ...answered, name: file.name }; // forms escape quotes in names
  const item = { row, file, url: URL.createObjectURL(file), heat: new Map() };
  items.push(item);
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = row.name;
  button.addEventListener("click", () => {
    show(item);
    byId("result").scrollIntoView({ block: "start" });
    byId("verdict").focus();
  });
  const line = byId("rows").insertRow();
  const name = document.createElement("th");
  name.scope = "row";
  name.append(button);
  line.append(name);
  const isOk = row.prediction !== null;
  const notes = [];
  if (!isOk) notes.push(row.error);
  if (isOk && row.abstained) notes.push("not confident enough");
  if (isUnusual(row)) notes.push("unusual");
  const cells = [isOk ? row.prediction : "–", isOk ? row.probability.toFixed(3) : "", isOk ? row.novelty.toFixed(3) : "", notes.join(", ")];
  cells.forEach((text, i) => {
    const cell = line.insertCell();
    cell.textContent = text;
    cell.className = ["", "number", "number", "note"][i];
  });
  item.line = line;
  byId("all").hidden = items.length < 2;
  return item;
}

// the result of one image
function show(item) {
  if (shown) shown.line.classList.remove("shown");
  shown = item;
  const { row } = item;
  const isOk = row.prediction !== null;
  item.line.classList.add("shown");
  byId("result").hidden = false;
  showImage(item.url, row.name);
  byId("caption").textContent = row.name;
  byId("verdict").textContent = summary(row);
  byId("verdict").tabIndex = -1;
  const cautions = [];
  if (isOk && row.abstained) cautions.push("The model is not confident enough to decide.");
  const others = (row.prediction_set || []).filter((name) => name !== row.prediction);
  if (others.length) cautions.push(`It could also be ${others.join(" or ")}.`);
  if (isOk && row.prediction_set && !row.prediction_set.length) cautions.push("None of the classes fits well.");
  if (isUnusual(row)) cautions.push("This image is unusual for the model and may show none of its classes; do not rely on the prediction.");
  byId("caution").textContent = cautions.join(" ");
  byId("novelty").textContent = isOk
    ? `Novelty ${row.novelty.toFixed(3)}: more unusual than ${percent(row.novelty)} of the images the model was checked on.`
    : "";
  byId("explain").hidden = !isOk;
  byId("heat").setAttribute("aria-pressed", "false");
  byId("heat").textContent = "Show heat map";
  if (isOk) byId("explained").value = row.prediction;
  showProbabilities(row, SHOWN_CLASSES);
}

function showImage(url, alt) {
  const image = document.createElement("img");
  image.alt = alt;
  image.addEventListener("error", () => {
    const none = document.createElement("div");
    none.className = "none";
    none.textContent = "This browser cannot show the image.";
    byId("view").replaceChildren(none);
  });
  image.src = url;
  byId("view").replaceChildren(image);
}

function showProbabilities(row, limit) {
  const probs = Object.entries(row.probs || {}).sort((a, b) => b[1] - a[1]);
  byId("more").hidden = probs.length <= limit;
  byId("probabilities").replaceChildren(
    ...probs.slice(0, limit).map(([name, p]) => {
      const line = document.createElement("tr");
      line.className = name === row.prediction ? "predicted" : "";
      const heading = document.createElement("th");
      heading.scope = "row";
      heading.textContent = name;
      line.append(heading);
      const value = line.insertCell();
      value.className = "number";
      value.textContent = percent(p);
      line.insertCell().append(bar(p));
      return line;
    }),
  );
}
byId("more").addEventListener("click", () => showProbabilities(shown.row, Infinity));

function bar(p) {
  const make = (name, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  const svg = make("svg", { class: "bar", viewBox: "0 0 100 6", preserveAspectRatio: "none", "aria-hidden": "true" });
  svg.append(make("rect", { class: "ground", width: 100, height: 6 }), make("rect", { class: "value", width: 100 * p, height: 6 }));
  return svg;
}

// heat map
async function showHeat() {
  const item = shown;
  const name = byId("explained").value;
  const button = byId("heat");
  button.disabled = true;
  report("Drawing the heat map …");
  try {
    if (!item.heat.has(name)) {
      const path = `v1/explain?class=${encodeURIComponent(name)}`;
      item.heat.set(name, URL.createObjectURL(await (await request(path, formOf([item.file]))).blob()));
    }
    if (item !== shown) return;
    showImage(item.heat.get(name), `Heat map: bright regions of ${item.row.name} support ${name}`);
    byId("caption").textContent = `${item.row.name}: bright regions support ${name}`;
    button.setAttribute("aria-pressed", "true");
    button.textContent = "Hide heat map";
    report(`Heat map for ${name} shown.`);
  } catch (error) {
    report(`No heat map: ${error.message}.`, true);
  } finally {
    button.disabled = false;
    button.focus();
  }
}

function hideHeat() {
  showImage(shown.url, shown.row.name);
  byId("caption").textContent = shown.row.name;
  byId("heat").setAttribute("aria-pressed", "false");
  byId("heat").textContent = "Show heat map";
}

byId("heat").addEventListener("click", () => (byId("heat").getAttribute("aria-pressed") === "true" ? hideHeat() : showHeat()));
byId("explained").addEventListener("change", () => {
  if (byId("heat").getAttribute("aria-pressed") === "true") showHeat();
});

// table as CSV; spreadsheets run cells that begin like a formula
const isFormula = (text) => /^[=+\-@\t\r]/.test(text);
const quoted = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
const safePath = (path) => (isFormula(path) ? `./${path}` : path);
const safeText = (text) => (isFormula(text.replace(/^'+/, "")) ? `'${text}` : text);

function cellsOf(row) {
  const isOk = row.prediction !== null;
  const number = (value) => (isOk ? value.toFixed(DECIMALS) : "");
  const json = (value) => (isOk ? JSON.stringify(value) : "");
  const cells = [safePath(row.name), row.status, safeText(row.error), isOk ? safeText(row.prediction) : "", number(row.probability)];
  cells.push(...model.classes.map((name) => (isOk ? number(row.probs[name]) : "")));
  for (const name of ["abstained", "prediction_set", "novelty"]) if (name in row) cells.push(json(row[name]));
  return cells;
}

byId("download").addEventListener("click", () => {
  const optional = ["abstained", "prediction_set", "novelty"].filter((name) => name in items[0].row);
  const header = ["path", "status", "error", "prediction", "probability", ...model.classes.map((name) => `prob_${name}`), ...optional];
  const lines = [header, ...items.map(({ row }) => cellsOf(row))].map((cells) => `${cells.map(quoted).join(",")}\r\n`);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(lines, { type: "text/csv" }));
  link.download = "predictions.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  report(`Saved ${items.length} rows in predictions.csv.`);
});

byId("clear").addEventListener("click", () => {
  for (const item of items.splice(0)) [item.url, ...item.heat.values()].forEach((url) => URL.revokeObjectURL(url));
  shown = null;
  byId("rows").replaceChildren();
  byId("all").hidden = byId("result").hidden = true;
  report("");
  byId("choose").focus();
});

// choose, photograph, drop, paste
for (const [button, input] of [["choose", "files"], ["photograph", "camera"]]) {
  byId(button).addEventListener("click", () => byId(input).click());
  byId(input).addEventListener("change", () => {
    classify([...byId(input).files]);
    byId(input).value = ""; // the same file can be chosen again
  });
}
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  classify([...event.dataTransfer.files]);
});
addEventListener("paste", (event) => classify([...event.clipboardData.files]));
loadModel();
