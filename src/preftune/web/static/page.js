// The labelling page: one module, no library. Order of the file: what was said and is not yet stored (Outbox), the
// server, the tasks at hand, drawing, differences, acts, keys.
//
// Texts of items reach the document either as HTML that the server has made safe (web/render.py) or as text nodes.

const MORE = 5;            // tasks to hold, so that the next one is there at once
const TWICE_MS = 250;      // a second tap this soon was meant for the item before
const TIMEOUT_MS = 10000;

const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
const letter = (place) => LETTERS[place] ?? String(place + 1);

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const key = (name) => make("kbd", {}, name);

// ---------------------------------------------------------------------------------------------------------- storage

const memory = new Map();  // stands in where the browser keeps nothing for us

function keep(name, value) {
  memory.set(name, value);
  try { localStorage.setItem(name, value); } catch { /* full or forbidden: the memory has it */ }
}
function kept(name) {
  try { return localStorage.getItem(name) ?? memory.get(name) ?? null; } catch { return memory.get(name) ?? null; }
}
function forget(name) {
  memory.delete(name);
  try { localStorage.removeItem(name); } catch { /* forbidden */ }
}
function names(prefix) {
  const found = new Set([...memory.keys()]);
  try { for (let i = 0; i < localStorage.length; i++) found.add(localStorage.key(i)); } catch { /* forbidden */ }
  return [...found].filter((name) => name.startsWith(prefix)).sort();
}

// ----------------------------------------------------------------------------------------------------------- server

class Refused extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

async function ask(method, path, body) {
  const headers = { "x-csrf-token": $('meta[name="csrf"]')?.content ?? "" };
  if (body !== undefined) headers["content-type"] = "application/json";
  const reply = await fetch(path, {
    method, headers, body: body === undefined ? undefined : JSON.stringify(body), credentials: "same-origin",
    cache: "no-store", redirect: "error", signal: AbortSignal.timeout(TIMEOUT_MS),
  });
  const said = await reply.json().catch(() => ({}));
  if (reply.ok) return said;
  throw new Refused(reply.status, said.error ?? `the server answered ${reply.status}`);
}

// ----------------------------------------------------------------------------------------------------------- outbox

// Whatever the annotator did is first kept here, then sent in order, and forgotten only when the server has stored it.
// The client key makes a second delivery harmless: after a lost reply, from another tab, after a reload.
class Outbox {
  constructor(space) { this.prefix = `${space}:out:`; this.busy = null; this.wait = 1000; this.counter = 0; this.waits = new Map(); }

  get entries() { return names(this.prefix).map((name) => [name, JSON.parse(kept(name) ?? "null")]).filter(([, entry]) => entry); }
  get tasks() { return new Set(this.entries.map(([, entry]) => entry.body.task)); }

  // The promise is of the server's reply; it never comes when the page is left before.
  add(path, body) {
    const client = crypto.randomUUID?.() ?? [...crypto.getRandomValues(new Uint8Array(16))].map((b) => b.toString(16).padStart(2, "0")).join("");
    const stamp = String(Date.now()).padStart(15, "0") + String(this.counter++).padStart(6, "0");
    const name = `${this.prefix}${stamp}-${client}`;
    keep(name, JSON.stringify({ path, body: { ...body, key: client } }));
    const reply = new Promise((resolve, reject) => this.waits.set(name, { resolve, reject }));
    reply.catch(() => {});
    this.flush();
    return reply;
  }

  flush() {
    clearTimeout(this.timer);
    this.busy ??= this.send().finally(() => { this.busy = null; if (this.entries.length && !this.paused) this.later(); });
    return this.busy;
  }

  later() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.flush(), this.wait);
    this.wait = Math.min(2 * this.wait, 15000);
  }

  async send() {
    this.paused = false;
    for (let entries = this.entries; entries.length; entries = this.entries) {
      const [name, entry] = entries[0];
      showSaved("sending", entries.length);
      let reply;
      try {
        reply = await ask("POST", entry.path, entry.body);
      } catch (problem) {
        const lasting = problem instanceof Refused && [400, 404, 409, 413, 422].includes(problem.status);
        if (!lasting) {
          this.paused = problem.status === 401 || problem.status === 403;
          return showSaved("unsaved", entries.length, this.paused ? "sign in again by your link, nothing is lost" : "trying again");
        }
        forget(name);  // it will never be accepted; the annotator is told, and the item comes again if it is open
        this.waits.get(name)?.reject(problem);
        showSaved("refused", 1, problem.message);
        refusedOne();
        continue;
      }
      forget(name);
      this.wait = 1000;
      this.waits.get(name)?.resolve(reply);
      this.waits.delete(name);
      if (reply.progress) showProgress(reply.progress);
    }
    if ($("#saved").dataset.state !== "refused") showSaved("saved");
  }
}

function showSaved(state, count = 0, why = "") {
  const saved = $("#saved");
  saved.dataset.state = state;
  saved.title = why;
  if (state === "saved") saved.textContent = "Saved";
  else if (state === "sending") saved.textContent = "Saving";
  else if (state === "refused") saved.textContent = `Not stored: ${why}`;
  else saved.textContent = `${count} unsaved: ${why}`;
}

function showProgress(progress) {
  $("#bar").max = Math.max(1, progress.total);
  $("#bar").value = Math.min(progress.team, progress.total);
  $("#progress").replaceChildren(`You ${progress.own}`, make("span", { class: "wide" }, `, today ${progress.own_today}`),
    make("span", { class: "team" }, `Team ${progress.team} of ${progress.total}`));
}

// ------------------------------------------------------------------------------------------------------------ tasks

let space = "";
let outbox = null;
const state = {
  current: null,    // the task on the desk
  queue: [],        // the ones after it
  done: [],         // answered since the page was opened, newest last: what Undo brings back at once
  revising: null,   // the task on the desk was answered before; what was on the desk waits here
  ranks: [], at: 0, strength: null, raw: false, diff: false, shownAt: 0, gone: new Set(), loading: null,
};

const isPair = (task) => task.responses.length === 2;

function refill() {
  state.loading ??= load().finally(() => { state.loading = null; });
  return state.loading;
}

async function load() {
  try {
    const answered = outbox.tasks;
    const count = Math.min(50, MORE + state.queue.length + answered.size + 1);
    const { tasks, progress } = await ask("POST", "/api/tasks", { count });
    const sent = outbox.tasks;
    const held = new Set([...state.queue, state.current, state.revising].filter(Boolean).map((task) => task.id));
    for (const task of tasks) {
      if (!held.has(task.id) && !answered.has(task.id) && !sent.has(task.id) && !state.gone.has(task.id)) state.queue.push(task);
    }
    if (!sent.size) showProgress(progress);
    if (!state.current) next();
    if (!state.current) showEmpty("All done", "There is nothing left for you to label. What others give back appears here.");
  } catch (problem) {
    if (state.current) return;
    if (problem.status === 401) showEmpty("Please open your link again", "This session has ended. Nothing you labelled is lost.");
    else showEmpty("No connection", `The next item could not be fetched: ${problem.message}.`);
  }
}

function next() {
  show(state.queue.shift() ?? null);
  if (state.queue.length < MORE - 2) refill();
}

function refusedOne() {
  state.gone.clear();
  refill();
}

// ---------------------------------------------------------------------------------------------------------- drawing

function show(task) {
  state.current = task;
  state.at = 0;
  const said = task?.answer ?? JSON.parse(kept(`${space}:draft`) ?? "null");
  const mine = said && (task?.answer || said.task === task?.id);
  state.ranks = mine && said.ranks?.length ? [...said.ranks] : (task?.responses ?? []).map(() => null);
  state.strength = mine ? said.strength ?? null : null;
  if (task && !isPair(task)) state.at = Math.max(0, state.ranks.indexOf(null));
  for (const id of ["prompt", "responses", "actions"]) $(`#${id}`).hidden = !task;
  $("#empty").hidden = Boolean(task);
  $("#banner").hidden = !state.revising;
  if (!task) return;
  drawTexts(task);
  drawActions(task);
  drawRanks();
  state.shownAt = performance.now();
}

function showEmpty(title, text) {
  show(null);
  $("#empty h2").textContent = title;
  $("#empty p").textContent = text;
}

const textBox = (part, attributes = {}) => {
  const box = make("div", { class: state.raw ? "text raw" : "text", dir: "auto", ...attributes });
  if (state.raw) box.textContent = part.raw; else box.innerHTML = part.html;
  return box;
};

function drawTexts(task) {
  const roles = { user: "User", assistant: "Assistant", system: "System" };
  $("#prompt").replaceChildren(...task.prompt.map((turn) =>
    make("div", { class: "turn" }, make("h2", { dir: "auto" }, roles[turn.role] ?? turn.role), textBox(turn))));
  $("#prompt").scrollTop = $("#prompt").scrollHeight;
  $("#responses").replaceChildren(...task.responses.map((response, place) => {
    const title = make("h2", { id: `title-${place}` }, make("b", { "aria-hidden": "true" }, letter(place)), `Response ${letter(place)}`);
    const head = make("div", {}, title);
    if (!isPair(task)) head.append(rankButtons(task, place));
    if (!response.finished) title.append(make("small", { class: "note" }, " (cut at the length limit)"));
    const box = textBox(response, { tabindex: "0", role: "region", "aria-labelledby": `title-${place}` });
    const card = make("article", { class: "response", "aria-labelledby": `title-${place}` }, head, box);
    card.addEventListener("pointerdown", () => { if (!isPair(task)) moveTo(place); });
    return card;
  }));
  if (state.diff) drawDiff();
}

function rankButtons(task, place) {
  const group = make("div", { class: "ranks", role: "radiogroup", "aria-label": `Rank of response ${letter(place)}` }, "Rank");
  task.responses.forEach((_, i) => {
    const button = make("button", { type: "button", role: "radio", "aria-checked": "false", "data-rank": i + 1, "data-place": place }, String(i + 1));
    button.addEventListener("click", () => { moveTo(place); setRank(i + 1); });
    group.append(button);
  });
  return group;
}

function drawRanks() {
  if (!state.current || isPair(state.current)) return;
  $$(".response").forEach((card, place) => {
    card.classList.toggle("current", place === state.at);
    $$("[data-rank]", card).forEach((button) => button.setAttribute("aria-checked", String(Number(button.dataset.rank) === state.ranks[place])));
  });
  const left = state.ranks.filter((rank) => rank === null).length;
  $('[data-act="save"]').disabled = left > 0;
  $('[data-act="save"] span').textContent = left ? `Rank ${left} more` : "Save ranking";
}

const STRENGTHS = [[1, "slightly", "Q"], [3, "clearly", "W"], [5, "much", "E"]];

function drawActions(task) {
  const act = (name, label, hint, extra = "") =>
    make("button", { type: "button", "data-act": name, class: extra }, make("span", {}, label), " ", key(hint));
  const judge = isPair(task)
    ? [act("first", "A better", "1", "side a"), act("tie", "Tie", "2"), act("second", "B better", "3", "side b"),
       act("both_bad", "Both bad", "4"), act("skip", "Skip", "5")]
    : [act("save", "Save ranking", "Enter", "main"), act("both_bad", "All bad", "X"), act("skip", "Skip", "S")];
  const strength = make("div", { class: "strength", role: "radiogroup", "aria-label": "How much better? Optional" }, "by");
  for (const [value, label, hint] of STRENGTHS) {
    strength.append(" ", make("button", { type: "button", role: "radio", "data-strength": value, "aria-checked": String(state.strength === value) }, label, " ", key(hint)));
  }
  const hint = make("p", { class: "hint" }, `Keys 1 to ${task.responses.length} rank the marked response; equal numbers tie`);
  $("#actions").replaceChildren(isPair(task) ? strength : hint, make("div", { class: "judge" }, ...judge));
  const said = task.answer;
  const which = said && (said.kind !== "ranking" ? said.kind : !isPair(task) ? "save" : said.ranks[0] === said.ranks[1] ? "tie" : said.ranks[0] < said.ranks[1] ? "first" : "second");
  if (which) $(`[data-act="${which}"]`).dataset.mine = "";
}

function setRaw() {
  state.raw = !state.raw;
  $('[data-do="raw"]').setAttribute("aria-pressed", String(state.raw));
  if (!state.current) return;
  drawTexts(state.current);
  drawRanks();
}

let hush = 0;
function say(text) {
  const said = $("#said");
  said.textContent = text;
  said.classList.add("shown");
  clearTimeout(hush);
  hush = setTimeout(() => said.classList.remove("shown"), 1800);
}

// ------------------------------------------------------------------------------------------------------ differences

// Words of one response that the other has not: a shortest edit script (Myers 1986) over words; of texts further apart
// than MAX_EDITS, the words that occur nowhere in the other.
const MAX_EDITS = 1200;

function wordsIn(box) {
  const words = [];
  const walker = document.createTreeWalker(box, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    for (const found of node.data.matchAll(/[\p{L}\p{N}\p{M}_'\u2019]+|[^\s\p{L}\p{N}\p{M}_]/gu)) {
      words.push({ text: found[0], node, start: found.index, end: found.index + found[0].length });
    }
  }
  return words;
}

// Positions of `one` that are not in a longest common subsequence with `two`.
function onlyIn(one, two) {
  let head = 0;
  while (head < one.length && head < two.length && one[head] === two[head]) head++;
  let tail = 0;
  while (tail < one.length - head && tail < two.length - head && one[one.length - 1 - tail] === two[two.length - 1 - tail]) tail++;
  const a = one.slice(head, one.length - tail), b = two.slice(head, two.length - tail);
  const common = shortestEdit(a, b);
  const other = new Set(b);
  return a.map((word, i) => (common ? !common.has(i) : !other.has(word)) ? head + i : -1).filter((i) => i >= 0);
}

// The positions of `a` on the path of a shortest edit script from `a` to `b`, or null beyond MAX_EDITS.
function shortestEdit(a, b) {
  const limit = Math.min(MAX_EDITS, a.length + b.length);
  const furthest = new Int32Array(2 * limit + 3), trace = [];
  for (let edits = 0; edits <= limit; edits++) {
    trace.push(furthest.slice(limit + 1 - edits - 1, limit + 1 + edits + 2));
    for (let k = -edits; k <= edits; k += 2) {
      const at = limit + 1 + k;
      const down = k === -edits || (k !== edits && furthest[at - 1] < furthest[at + 1]);
      let x = down ? furthest[at + 1] : furthest[at - 1] + 1;
      while (x < a.length && x - k < b.length && a[x] === b[x - k]) x++;
      furthest[at] = x;
      if (x >= a.length && x - k >= b.length) return walkBack(a, b, trace);
    }
  }
  return null;
}

function walkBack(a, b, trace) {
  const common = new Set();
  let x = a.length, y = b.length;
  for (let edits = trace.length - 1; edits >= 0; edits--) {
    const furthest = (k) => trace[edits][k + edits + 1];
    const k = x - y;
    const down = k === -edits || (k !== edits && furthest(k - 1) < furthest(k + 1));
    const from = edits === 0 ? 0 : down ? furthest(k + 1) : furthest(k - 1) + 1;
    while (x > from) common.add(--x), y--;
    if (edits > 0) { if (down) y--; else x--; }
  }
  return common;
}

// Runs of neighbouring words become one mark, blanks between them included.
function markWords(words, positions) {
  const runs = [];
  for (const i of positions) {
    const last = runs.at(-1);
    if (last && last.to === i - 1 && words[i].node === words[i - 1].node) last.to = i;
    else runs.push({ from: i, to: i });
  }
  for (const { from, to } of runs.reverse()) {  // last first, so that earlier offsets in a text node stay true
    const range = document.createRange();
    range.setStart(words[from].node, words[from].start);
    range.setEnd(words[to].node, words[to].end);
    range.surroundContents(document.createElement("mark"));
  }
}

function drawDiff() {
  const boxes = $$(".response .text");
  const words = boxes.map(wordsIn), texts = words.map((list) => list.map((word) => word.text));
  const pair = boxes.length === 2;
  const found = boxes.map((_, i) => {
    if (pair) return onlyIn(texts[i], texts[1 - i]);
    return i === state.at ? [] : onlyIn(texts[i], texts[state.at]);
  });
  found.forEach((positions, i) => markWords(words[i], positions));
}

function setDiff() {
  state.diff = !state.diff;
  $('[data-do="diff"]').setAttribute("aria-pressed", String(state.diff));
  if (!state.current) return;
  redrawKeepingPlace();
  if (state.diff) say(isPair(state.current) ? "Words the other one has not are marked" : `Words that ${letter(state.at)} has not are marked`);
}

function redrawKeepingPlace() {
  const places = $$(".response .text").map((box) => box.scrollTop);
  const above = $("#prompt").scrollTop;
  drawTexts(state.current);
  drawRanks();
  $$(".response .text").forEach((box, i) => { box.scrollTop = places[i]; });
  $("#prompt").scrollTop = above;
}

// ------------------------------------------------------------------------------------------------------------- acts

const SAID = { first: "A better", second: "B better", tie: "Tie", both_bad: "Both bad", skip: "Skipped" };
const PAIR_RANKS = { first: [1, 2], second: [2, 1], tie: [1, 1] };

function decide(name, reason = "") {
  const task = state.current;
  if (!task) return;
  if (name === "skip" && !reason && !$("#skip").open) return askWhy();
  if (name === "save" && state.ranks.includes(null)) return say("Rank every response first");
  const ranks = PAIR_RANKS[name] ?? (name === "save" ? state.ranks : []);
  const kind = ranks.length ? "ranking" : name;
  const strength = kind === "ranking" ? state.strength : null;
  const answer = { kind, ranks, strength, reason };
  const revising = state.revising;
  const sent = outbox.add(task.answer ? "/api/revise" : "/api/answer", { task: task.id, item: task.item, ...answer });
  sent.then((reply) => { if (!reply.stored) say("That item had your label already; History changes it"); }, () => {});
  say(`${name === "save" ? ranks.map((rank, place) => `${letter(place)} ${rank}`).join(", ") : SAID[name]}. Z takes it back`);
  forget(`${space}:draft`);
  state.gone.add(task.id);
  state.done.push({ ...task, answer: revising ? answer : undefined, said: answer, was: task.answer });
  if (revising) return leaveRevision();
  next();
}

function askWhy() {
  const dialog = $("#skip");
  $("input", dialog).value = "";
  dialog.returnValue = "";
  dialog.showModal();
  $("button.main", dialog).focus();
}

function moveTo(place) {
  state.at = Math.min(Math.max(place, 0), state.current.responses.length - 1);
  if (state.diff) redrawKeepingPlace(); else drawRanks();
  $$(".response")[state.at].scrollIntoView({ block: "nearest" });
}

function setRank(rank) {
  state.ranks[state.at] = rank;
  keepDraft();
  const open = state.ranks.indexOf(null);
  moveTo(open >= 0 ? open : state.at);
}

function setStrength(value) {
  state.strength = state.strength === value ? null : value;
  $$("[data-strength]").forEach((button) => button.setAttribute("aria-checked", String(Number(button.dataset.strength) === state.strength)));
  keepDraft();
}

function keepDraft() {
  if (!state.revising) keep(`${space}:draft`, JSON.stringify({ task: state.current.id, ranks: state.ranks, strength: state.strength }));
}

async function undo() {
  if (state.revising) return leaveRevision();
  const last = state.done.pop();
  if (last) {  // at once: the outbox keeps the order
    state.gone.delete(last.id);
    outbox.add("/api/undo", {}).then(() => refill(), () => {});
    if (last.was) return say(`Taken back: the change of ${describe(last.said, last.responses.length)}`);
    if (state.current) state.queue.unshift(state.current);
    show({ ...last, answer: undefined });
    return say(`Taken back: ${describe(last.said, last.responses.length)}`);
  }
  try {
    const { task } = await outbox.add("/api/undo", {});
    state.gone.delete(task.id);
    if (task.answer) return say("Taken back: the last change");
    if (state.current && state.current.id !== task.id) state.queue.unshift(state.current);
    state.queue = state.queue.filter((other) => other.id !== task.id);
    show(task);
    say("Taken back: your last label");
  } catch (problem) {
    showSaved("saved");
    say(problem.message);
  }
}

function describe(answer, k) {
  if (answer.kind !== "ranking") return answer.kind === "both_bad" && k > 2 ? "All bad" : SAID[answer.kind];
  if (k > 2) return answer.ranks.map((rank, place) => `${letter(place)} ${rank}`).join(", ");
  return answer.ranks[0] === answer.ranks[1] ? SAID.tie : answer.ranks[0] < answer.ranks[1] ? SAID.first : SAID.second;
}

async function openHistory() {
  const list = $("#history ol");
  list.replaceChildren(make("li", {}, "Loading"));
  $("#history").showModal();
  await outbox.flush();
  try {
    const { tasks } = await ask("GET", "/api/history");
    list.replaceChildren(...tasks.map((task) => {
      const button = make("button", { type: "button" }, make("span", {}, describe(task.answer, task.responses.length)),
        make("span", { dir: "auto" }, task.prompt.at(-1).raw.slice(0, 160)));
      button.addEventListener("click", () => { $("#history").close(); revise(task); });
      return make("li", {}, button);
    }));
    if (!tasks.length) list.replaceChildren(make("li", {}, "Nothing yet."));
    $("button", list)?.focus();
  } catch (problem) {
    list.replaceChildren(make("li", {}, `Not available now: ${problem.message}`));
  }
}

function revise(task) {
  if (state.revising === null) state.revising = state.current ?? false;
  $("#banner").textContent = `You said: ${describe(task.answer, task.responses.length)}. A new answer replaces it; Esc leaves it.`;
  show(task);
}

function leaveRevision() {
  const waiting = state.revising;
  state.revising = null;
  if (waiting) show(waiting); else next();
  if (!state.current) refill();
}

const THEMES = ["system", "light", "dark"];
function turnTheme() {
  const theme = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
  document.documentElement.dataset.theme = theme;
  document.cookie = `preftune_theme=${theme}; path=/; max-age=31536000; samesite=strict`;
  say(`Theme: ${theme}`);
}

function turnGuidelines(open) {
  const panel = $("#guidelines");
  if (!panel) return say("No guidelines were given");
  panel.hidden = !(open ?? panel.hidden);
  $('nav [data-do="guidelines"]').setAttribute("aria-expanded", String(!panel.hidden));
  keep("preftune:guidelines", panel.hidden ? "closed" : "open");
  if (open === undefined && !panel.hidden) panel.focus();
}

// Labels on their way stay in this browser under the annotator's name, and are sent when the same one is back.
async function leave() {
  try { await ask("POST", "/api/leave", {}); } catch (problem) { if (problem.status !== 401) return say(problem.message); }
  location.assign("/enter");
}

const TOOLS = {
  undo, history: openHistory, diff: setDiff, raw: setRaw, guidelines: () => turnGuidelines(), theme: turnTheme,
  help: () => $("#help").showModal(),
  leave,
  refresh: () => { showEmpty("Loading", ""); outbox.flush(); refill(); },
};

// ------------------------------------------------------------------------------------------------------------- keys

const PAIR_KEYS = { 1: "first", 2: "tie", 3: "second", 4: "both_bad", 5: "skip", a: "first", t: "tie", b: "second", x: "both_bad", s: "skip" };
const TOOL_KEYS = { z: "undo", h: "history", d: "diff", r: "raw", g: "guidelines", l: "theme", "?": "help" };
const STRENGTH_KEYS = Object.fromEntries(STRENGTHS.map(([value, , hint]) => [hint.toLowerCase(), value]));
const REASONS = ["I cannot judge this", "The prompt makes no sense", "A text is broken or missing", "I would rather not read this"];
const KEYS = [
  ["1 A", "A is better"], ["2 T", "tie"], ["3 B", "B is better"], ["4 X", "both bad"], ["5 S", "skip, with a reason"],
  ["Q W E", "slightly, clearly, much: before the answer, optional"],
  ["1 to 9", "ranking: the rank of the marked response, then on to the next; equal numbers tie"],
  ["Left Right", "ranking: mark another response"], ["Backspace", "ranking: clear the last rank"], ["Enter", "ranking: save"],
  ["Z", "take back"], ["H", "earlier labels, to change them"], ["D", "differences of the texts"], ["R", "raw text"],
  ["J K", "scroll the responses"], ["Shift J K", "scroll the prompt"], ["G", "guidelines"], ["L", "light or dark"], ["Esc", "back"],
];

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const dialog = $("dialog[open]");
  if (dialog) return dialog.id === "skip" ? onSkipKey(event) : undefined;
  const field = event.target.closest("input, textarea");
  if (field && !field.closest("dialog")) return;  // a closed dialog keeps the focus until the next frame
  const name = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (scrollBy(name, event.shiftKey)) return event.preventDefault();
  if (event.repeat) return;
  if (TOOL_KEYS[name]) { event.preventDefault(); return void TOOLS[TOOL_KEYS[name]](); }
  if (name === "Escape" && state.revising !== null) return leaveRevision();
  if (!state.current) return;
  if (STRENGTH_KEYS[name] && isPair(state.current)) return setStrength(STRENGTH_KEYS[name]);
  if (isPair(state.current) ? pairKey(name) : rankingKey(name, event)) event.preventDefault();
}

function scrollBy(name, prompt) {
  if (name !== "j" && name !== "k") return false;
  for (const box of prompt ? [$("#prompt")] : $$(".response .text")) box.scrollBy({ top: (name === "j" ? 1 : -1) * 0.6 * box.clientHeight });
  return true;
}

function pairKey(name) {
  if (!PAIR_KEYS[name]) return false;
  decide(PAIR_KEYS[name]);
  return true;
}

function rankingKey(name, event) {
  const k = state.current.responses.length;
  if (/^[1-9]$/.test(name) && Number(name) <= k) setRank(Number(name));
  else if (name === "ArrowLeft") moveTo(state.at - 1);
  else if (name === "ArrowRight") moveTo(state.at + 1);
  else if (name === "Backspace") clearRank();
  else if (name === "Enter" && !event.target.closest("button")) decide("save");
  else if (name === "x") decide("both_bad");
  else if (name === "s") decide("skip");
  else return false;
  return true;
}

function clearRank() {
  const at = state.ranks[state.at] !== null ? state.at : Math.max(0, state.at - 1);
  state.ranks[at] = null;
  keepDraft();
  moveTo(at);
}

function onSkipKey(event) {
  const reason = REASONS[Number(event.key) - 1];
  if (!reason || event.target.closest("input")) return;
  event.preventDefault();
  endSkip(reason);
}

function endSkip(reason) {
  decide("skip", reason);
  $("#skip").close("");
}

function onClick(event) {
  const button = event.target.closest("button");
  if (!button || button.closest("dialog")) return;
  if (button.dataset.do) return void TOOLS[button.dataset.do]();
  if (button.dataset.strength) return setStrength(Number(button.dataset.strength));
  if (!button.dataset.act) return;
  const byPointer = event.detail > 0;
  if (event.detail > 1 || (byPointer && performance.now() - state.shownAt < TWICE_MS)) return;
  decide(button.dataset.act);
}

function prepareDialogs() {
  $("#skip .reasons").append(...REASONS.map((reason, i) => {
    const button = make("button", { type: "button" }, key(String(i + 1)), ` ${reason}`);
    button.addEventListener("click", () => endSkip(reason));
    return button;
  }));
  $("#skip form").addEventListener("submit", (event) => {
    if (event.submitter?.value === "skip") decide("skip", $("#skip input").value.trim());
  });
  for (const [keys, meaning] of KEYS) {
    $("#help dl").append(make("dt", {}, ...keys.split(" ").flatMap((part) => [key(part), " "])), make("dd", {}, meaning));
  }
}

// ------------------------------------------------------------------------------------------------------------ start

function startPage() {
  space = `preftune:${document.body.dataset.database}:${document.body.dataset.annotator}`;
  outbox = new Outbox(space);
  prepareDialogs();
  turnGuidelinesAtStart();
  document.addEventListener("keydown", onKey);
  document.addEventListener("click", onClick);
  addEventListener("online", () => { outbox.flush(); refill(); });
  document.addEventListener("visibilitychange", () => { if (!document.hidden) { outbox.flush(); if (!state.current) refill(); } });
  addEventListener("beforeunload", (event) => { if (outbox.entries.length) event.preventDefault(); });
  outbox.flush();
  refill();
}

function turnGuidelinesAtStart() {
  if (!$("#guidelines")) return;
  turnGuidelines(kept("preftune:guidelines") !== "closed" && matchMedia("(min-width: 62rem)").matches);
}

// The token stands behind the # of the link: no server, log or Referer ever sees it there.
function startDoor() {
  const given = new URLSearchParams(location.hash.slice(1));
  history.replaceState(null, "", location.pathname);
  const token = given.get("token"), invite = given.get("invite");
  for (const form of $$("form")) {
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const said = Object.fromEntries(new FormData(form));
      enter(form.id === "join" ? { invite, ...said } : said);
    });
  }
  if (token) return enter({ token });
  if (!invite || !$("#join")) return;
  $("#login").hidden = true;
  $("#join").hidden = false;
  $("#door").textContent = "You are invited to label.";
  $("#join input").focus();
}

async function enter(key) {
  try {
    $("#door").textContent = "Opening";
    await ask("POST", "/api/session", key);
    location.replace("/");
  } catch (problem) {
    $("#door").textContent = `The door stays closed: ${problem.message}.`;
  }
}

addEventListener("hashchange", () => { if (document.body.classList.contains("door")) location.reload(); });
if (document.body.classList.contains("door")) startDoor(); else startPage();
