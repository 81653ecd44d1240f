// Draws the report's figures and its table of facts. Everything it needs is in the page.
const { figures, cases, columns } = JSON.parse(document.getElementById("data").textContent);
const views = new Map(); // figure -> its drawn panels
const $ = (id) => document.getElementById(id);

const shownRuns = () => [...document.querySelectorAll("[data-run]")].filter((box) => box.checked).map((box) => box.dataset.run);

// A copy of a spec with values set by JSON pointer.
function withValues(spec, values) {
  const copy = structuredClone(spec);
  for (const [pointer, value] of Object.entries(values)) {
    const path = pointer.slice(1).split("/");
    const last = path.pop();
    path.reduce((place, part) => place[part], copy)[last] = value;
  }
  return copy;
}

async function draw(section) {
  const figure = figures[section.dataset.figure];
  const log = section.querySelector("[data-log]")?.checked ?? false;
  const drawn = [];
  for (const plot of section.querySelectorAll("[data-panel]")) {
    const panel = figure.panels[Number(plot.dataset.panel)];
    const spec = log ? withValues(panel.spec, panel.log) : panel.spec;
    const { view, finalize } = await vegaEmbed(plot, spec, { actions: false, renderer: panel.canvas ? "canvas" : "svg" });
    drawn.push({ view, finalize });
  }
  views.get(section)?.forEach(({ finalize }) => finalize());
  views.set(section, drawn);
  await update(section);
}

// Set the runs shown and the chosen options in a figure's panels.
async function update(section) {
  const signals = { shown: shownRuns() };
  for (const select of section.querySelectorAll("[data-choice]")) signals[select.dataset.choice] = select.value;
  for (const { view } of views.get(section) ?? []) {
    const known = Object.keys(view.getState({ signals: () => true }).signals);
    for (const [name, value] of Object.entries(signals)) if (known.includes(name)) view.signal(name, value);
    await view.runAsync();
  }
}

const sections = [...document.querySelectorAll("[data-figure]")];
for (const section of sections) {
  section.querySelectorAll("[data-choice]").forEach((select) => select.addEventListener("change", () => update(section)));
  section.querySelector("[data-log]")?.addEventListener("change", () => draw(section));
}
document.querySelectorAll("[data-run]").forEach((box) => box.addEventListener("change", () => sections.forEach(update)));

// Facts: those of a run that match, a page of them at a time.
const PAGE = 50;
let visible = PAGE;

function cell(row, text, className) {
  const td = row.insertCell();
  td.textContent = text ?? "";
  if (className) td.className = className;
}

function listCases() {
  const table = cases[Number($("case-run").value)];
  const wanted = $("case-search").value.trim().toLocaleLowerCase();
  const state = $("case-state").value;
  const found = table.rows.filter((row) => (!state || row[4] === state)
    && (!wanted || row.some((value) => typeof value !== "boolean" && String(value ?? "").toLocaleLowerCase().includes(wanted))));
  const body = document.createElement("tbody");
  const said = (right) => (right === null ? "" : right ? "right" : "wrong");
  for (const [id, prompt, target, truth, kind, before, after, last, saidBefore, saidAfter] of found.slice(0, visible)) {
    const row = body.insertRow();
    const texts = [id, prompt, target, truth, kind, said(before), said(after), last, saidBefore, saidAfter];
    for (const column of columns) cell(row, texts[column]); // the columns that have a value in some row
  }
  $("cases").tBodies[0].replaceWith(body);
  const left = table.left_out ? `, ${table.left_out} more in cases.jsonl` : "";
  $("case-count").textContent = `${found.length} of ${table.rows.length} facts${left}`;
  $("case-more").hidden = found.length <= visible;
}

if (cases.length) {
  const again = () => { visible = PAGE; listCases(); };
  $("case-controls").addEventListener("submit", (event) => event.preventDefault());
  $("case-controls").addEventListener("input", again);
  $("case-more").addEventListener("click", () => { visible += PAGE; listCases(); });
  listCases();
}

// The page of an unfinished run reloads itself, unless the reader turns that off.
const refresh = $("refresh");
if (refresh) setInterval(() => { if (refresh.checked) location.reload(); }, 1000 * Number(refresh.dataset.seconds));

for (const section of sections) {
  try {
    await draw(section);
  } catch (error) {
    console.error(section.dataset.figure, error);
  }
}
document.body.dataset.ready = "true";
