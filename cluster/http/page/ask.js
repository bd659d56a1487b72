// Asks the service that the page is from: document and question in, progress and tokens as they come.
"use strict";

const TOKEN_KEY = "homer-token";
const STATUS_MS = 500;
const get = (id) => document.getElementById(id);
const view = new EvidenceView(get("evidence"));
let model = null, running = null;

class AskError extends Error {}

function headers() {
  const token = get("token").value.trim();
  return { "Content-Type": "application/json", ...(token && { Authorization: `Bearer ${token}` }) };
}

// A call of the service; what goes wrong is told in words.
async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers() });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new AskError("The service cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  if (response.status === 401) throw new AskError(askForToken());
  const told = await response.json().catch(() => null);
  const reason = told?.error?.message ?? `the service answered with status ${response.status}`;
  const later = response.headers.get("Retry-After");
  throw new AskError(reason + (later ? ` (try again in ${later} s)` : ""));
}

// Shows the field for it, and returns why.
function askForToken() {
  const why = get("token").value ? "The service does not take this access token." :
    "This service asks for an access token.";
  get("token-field").hidden = false;
  get("token-hint").textContent = `${why} It is kept in this tab alone.`;
  get("token").focus();
  return why;
}

async function learnModel() {
  const [told] = (await (await call("v1/models")).json()).data;
  model = told;
  const { max_chunk_len: chunk, target_len: target, model_window: window_ } = told.homer;
  get("model").textContent = `${told.id}: a window of ${count(window_)} tokens, documents of up to ` +
    `${count(told.max_model_len)}; chunks of ${count(chunk)}, a final cache of ${count(target)}.`;
}

function body(text, question) {
  const prefix = get("prefix").value;
  const common = {
    model: model.id, stream: true, max_tokens: Number(get("max-tokens").value),
    temperature: Number(get("temperature").value),
    homer: { progress: true, return_evidence: true },
  };
  if (!model.homer.chat) {
    Object.assign(common.homer, { prefix: prefix && `${prefix}\n`, question: `\n${question}` });
    return ["v1/completions", { ...common, prompt: text }];
  }
  const parts = [text, question].map((part) => ({ type: "text", text: part }));
  const messages = [{ role: "user", content: parts }];
  if (prefix) messages.unshift({ role: "system", content: prefix });
  return ["v1/chat/completions", { ...common, messages }];
}

// The objects of a stream of server-sent events.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new AskError("The connection broke before the answer was complete.");
    const lines = (waiting + value).split("\n");
    waiting = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}

async function ask(text, question, signal) {
  if (!model) await learnModel();
  const [path, asked] = body(text, question);
  const response = await call(path, { method: "POST", body: JSON.stringify(asked), signal });
  let told = 0, facts = null;
  for await (const event of events(response)) {
    if (event.error) throw new AskError(event.error.message);
    const { accepted, progress, evidence } = event.homer ?? {};
    const [choice] = event.choices;
    const piece = choice?.delta?.content ?? choice?.text;
    if (accepted) {
      view.plan(accepted.level_nodes, accepted.context_tokens);
      status(`Reading ${count(accepted.context_tokens)} tokens in ${count(accepted.leaves)} parts …`);
    }
    if (progress?.kind === "gather") status("Gathering what was kept …");
    else if (progress) {
      view.tree.node(progress);
      if (performance.now() - told > STATUS_MS) {
        told = performance.now();
        status(`Reading: ${count(progress.leaves_done)} of ${count(progress.leaves_total)} leaves, ` +
          `${count(progress.merges_done)} of ${count(progress.merges_total)} merges`);
      }
    }
    if (piece) {
      const first = !get("answer").textContent;
      if (first) status("Answering …");
      get("answer").append(first ? piece.trimStart() : piece);
    }
    if (evidence) {
      facts = event.homer;
      view.show(text, evidence);
    }
  }
  return facts;
}

function status(text) {
  get("status").textContent = text;
}

function fail(message) {
  get("error").textContent = message;
  get("error").hidden = !message;
}

function busy(on) {
  get("send").disabled = on;
  get("cancel").hidden = !on;
  get("answer").classList.toggle("running", on);
}

get("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  // Ctrl+Enter asks while the button does not.
  if (get("send").disabled) return;
  const text = get("document").value.trim(), question = get("question").value.trim();
  fail("");
  if (!text || !question) return fail("Give a document and a question.");
  get("answer").textContent = get("facts").textContent = "";
  get("evidence").replaceChildren();
  get("answer-card").hidden = false;
  if (get("token").value) sessionStorage.setItem(TOKEN_KEY, get("token").value);
  running = new AbortController();
  busy(true);
  status("Sending …");
  try {
    const facts = await ask(text, question, running.signal);
    if (!facts) throw new AskError("The service ended the answer before its summary.");
    const { seconds } = facts, workers = Object.keys(facts.nodes_by_worker).length;
    status("Done.");
    get("facts").textContent = `First word after ${seconds.time_to_first_token.toFixed(2)} s, done after ` +
      `${seconds.total.toFixed(2)} s, on ${workers} worker${workers > 1 ? "s" : ""}.`;
  } catch (error) {
    status("");
    if (error.name === "AbortError") status("Cancelled.");
    else fail(error instanceof AskError ? error.message : `The page failed: ${error.message}`);
    get("answer-card").hidden = !get("answer").textContent;
  } finally {
    busy(false);
  }
});

get("cancel").addEventListener("click", () => {
  running.abort();
  get("question").focus();
});

for (const id of ["document", "question"]) {
  get(id).addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) get("ask").requestSubmit();
  });
}

// ---- files

async function take(file) {
  fail("");
  try {
    get("document").value = await readFile(file);
    tellSize(file.name);
  } catch (error) {
    fail(error.message);
  }
}

async function readFile(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  if (String.fromCharCode(...bytes.slice(0, 5)) === "%PDF-") {
    throw new AskError(`${file.name} is a PDF, which this page does not read: save it as text first, ` +
      "for instance with pdftotext.");
  }
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    throw new AskError(`${file.name} is not text in UTF-8: save it as text first.`);
  }
  return /\.html?$/i.test(file.name) || file.type === "text/html" ? textOfHtml(text) : text;
}

// A browser tells of every style that this page's policy forbids, though nothing here is shown.
const STYLES = /<style\b[^]*?<\/style\s*>/gi;
const STYLE_OF_TAG = /(<[^>]*?)\sstyle\s*=\s*(?:"[^"]*"|'[^']*'|[^\s>]+)/gi;

function textOfHtml(html) {
  const plain = html.replace(STYLES, "").replace(STYLE_OF_TAG, "$1");
  const page = new DOMParser().parseFromString(plain, "text/html");
  page.querySelectorAll("script, noscript, template").forEach((one) => one.remove());
  page.querySelectorAll("p, div, li, h1, h2, h3, h4, h5, h6, tr, br, section, article, blockquote, pre")
    .forEach((one) => one.after("\n"));
  return page.body.textContent.replace(/[ \t]+/g, " ").replace(/ ?\n\s*\n\s*/g, "\n\n").trim();
}

function tellSize(name = "") {
  const { length } = get("document").value;
  get("document-size").textContent = `${name}${name && ": "}${count(length)} characters`;
}

get("file").addEventListener("change", ({ target }) => target.files[0] && take(target.files[0]));
get("document").addEventListener("input", () => tellSize());
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => event.preventDefault());
get("drop").addEventListener("dragover", () => get("drop").classList.add("over"));
get("drop").addEventListener("dragleave", () => get("drop").classList.remove("over"));
get("drop").addEventListener("drop", ({ dataTransfer }) => {
  get("drop").classList.remove("over");
  const [file] = dataTransfer.files;
  const text = dataTransfer.getData("text/plain");
  if (file) take(file);
  else if (text) {
    get("document").value = text;
    tellSize();
  }
});

get("token").value = sessionStorage.getItem(TOKEN_KEY) ?? "";
// Where a token is missing, its field says so.
learnModel().catch((error) => get("token-field").hidden && fail(error.message));
