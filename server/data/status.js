
// The page's own text apart, everything is put in as text nodes, never as HTML.
const POLL_MS = 2000;
const PATIENCE_MS = 30000;
const element = (id) => document.getElementById(id);
const [unlock, keyField, ask, prompt, send, answer] =
  ["unlock", "key", "ask", "prompt", "send", "answer"].map(element);

let key = "";
let locked = !unlock.hidden;
let model = null;
let chat = false;
let running = null;

function show(id, text) {
  // A live region is read out when it is written, even if nothing changed.
  if (element(id).textContent !== text) element(id).textContent = text;
}

const number = (value, digits = 0) =>
  value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const percent = (share) => `${number(100 * share, 1)} %`;
const count = (value, digits) => (value === null ? "–" : number(value, digits));
const short = (value) =>
  value < 1e6 ? number(value) : value < 1e9 ? `${number(value / 1e6, 1)} M` : `${number(value / 1e9, 2)} B`;

function duration(seconds) {
  if (seconds === null) return "–";
  if (seconds < 0.9995) return `${number(1e3 * seconds, seconds < 0.1 ? 1 : 0)}\u00a0ms`;
  return `${number(seconds, 2)}\u00a0s`;
}

function uptime(seconds) {
  const units = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const first = units.findIndex(([, size]) => seconds >= size);
  const parts = first < 0 ? [["s", 1]] : units.slice(first, first + 2);
  const text = ([unit, size], place) =>
    `${Math.floor((place ? seconds % parts[0][1] : seconds) / size)} ${unit}`;
  return parts.map(text).join(" ");
}

function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  return fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
}

const poll = (path) => request(path, { signal: AbortSignal.timeout(PATIENCE_MS) });

async function messageOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

function lock(message) {
  locked = true;
  key = "";
  unlock.hidden = false;
  show("refusal", message);
  keyField.focus();
}

function showFacts(status) {
  const sliced = status.sliceserve;
  model = status.model;
  chat = status.chat;
  document.title = `${model}: sliceserve`;
  show("model", model);
  const calibration = sliced.calibration === "self" ? "text it wrote itself" : sliced.calibration;
  const origin = [
    `Sliced from ${sliced.source ?? "a model whose name was not kept"}`,
    calibration && `calibrated on ${calibration}`,
    `stored as ${sliced.dtype}.`,
  ];
  const larger = sliced.ratio < 1 ? "" : " Not smaller than the dense model.";
  show("origin", origin.filter(Boolean).join(", ") + larger);
  show("ratio", percent(sliced.ratio));
  show("parameters", short(sliced.parameters));
  show("dense", short(sliced.dense_parameters));
  show("fraction", percent(sliced.fraction));
  show("rotations", sliced.rotations);
  show("width", `${number(sliced.width)} of ${number(sliced.hidden_size)}`);
  show("prompt-label", chat ? "Message" : "Text to continue");
}

function showFigures(status) {
  show("rate", count(status.generation_tokens_per_second, 1));
  show("running", count(status.requests_running));
  show("waiting", count(status.requests_waiting));
  show("first", duration(status.time_to_first_token_seconds));
  show("each", duration(status.time_per_output_token_seconds));
  show("gpus", status.gpus ? number(status.gpus) : "none");
  show("devices", status.gpus === 1 ? "GPU" : status.gpus ? "GPUs" : "GPUs: it runs on the CPU");
  show("uptime", `, up ${uptime(status.uptime_seconds)}`);
}

function forgetFigures() {
  for (const id of ["rate", "running", "waiting", "first", "each"]) show(id, "–");
  show("uptime", "");
}

async function pollStatus() {
  if (locked) return;
  const asked = key;
  const response = await poll("status.json").catch(() => null);
  // The answer to another key says nothing of this one.
  if (key !== asked) return;
  if (response?.status === 401) lock(await messageOf(response));
  if (!response?.ok) {
    forgetFigures();
    return;
  }
  const status = await response.json();
  const entering = unlock.contains(document.activeElement);
  unlock.hidden = true;
  show("refusal", "");
  showFacts(status);
  showFigures(status);
  element("content").hidden = false;
  if (entering) element("model").focus();
}

async function pollPhase() {
  let phase = { status: "failing", step: "the server does not answer" };
  try {
    phase = await (await poll("livez")).json();
  } finally {
    element("phase").className = `phase ${phase.status}`;
    show("phase", phase.status === "serving" ? "serving" : `${phase.status}: ${phase.step}`);
  }
}

async function repeat(look) {
  try {
    if (!document.hidden) await look();
  } catch {
    // The phase says that the server does not answer.
  }
  setTimeout(repeat, POLL_MS, look);
}

async function* dataOf(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

async function complete(text, signal) {
  const input = chat ? { messages: [{ role: "user", content: text }] } : { prompt: text };
  const body = { model, ...input, max_tokens: element("limit").valueAsNumber, stream: true, stream_options: { include_usage: true } };
  const began = performance.now();
  const seconds = () => (performance.now() - began) / 1e3;
  const response = await request(chat ? "v1/chat/completions" : "v1/completions", {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
  });
  if (!response.ok) {
    const message = await messageOf(response);
    if (response.status === 401) lock(message);
    return message;
  }
  const written = answer.appendChild(new Text());
  let first = null;
  let usage = null;
  for await (const chunk of dataOf(response)) {
    if (chunk.error) return chunk.error.message;
    usage = chunk.usage ?? usage;
    const piece = chunk.choices?.[0]?.delta?.content ?? chunk.choices?.[0]?.text;
    if (!piece) continue;
    first ??= seconds();
    written.appendData(piece);
  }
  if (!usage) return "The answer ended early.";
  const tokens = `${number(usage.completion_tokens)} ${usage.completion_tokens === 1 ? "token" : "tokens"}`;
  return `${tokens} in ${duration(seconds())}${first === null ? "" : `, the first after ${duration(first)}`}.`;
}

unlock.addEventListener("submit", async (event) => {
  event.preventDefault();
  key = keyField.value.trim();
  keyField.value = "";
  locked = false;
  show("refusal", "");
  await pollStatus();
  if (!locked && model === null) show("refusal", "The server is not ready yet; this page tries again by itself.");
});

// One button sends and stops, so that the keyboard's focus stays where it is.
ask.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (running) {
    running.abort();
    return;
  }
  running = new AbortController();
  send.textContent = "Stop";
  answer.replaceChildren();
  answer.setAttribute("aria-busy", "true"); // read out once it is whole
  show("outcome", "");
  try {
    show("outcome", await complete(prompt.value, running.signal));
  } catch (error) {
    show("outcome", error.name === "AbortError" ? "Stopped." : "The connection ended before the answer did.");
  } finally {
    answer.removeAttribute("aria-busy");
    send.textContent = "Send";
    running = null;
  }
});

prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.repeat) {
    event.preventDefault();
    ask.requestSubmit();
  }
});

repeat(pollPhase);
repeat(pollStatus);
