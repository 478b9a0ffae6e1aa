// The page: what is asked, what is shown, and what the keys do.

import { getModel, isReady, stream } from "/static/api.js";
import { appendText, explainTokens, readTokens } from "/static/tokens.js";

const $ = (id) => document.getElementById(id);
const log = $("log");
const prompt = $("prompt");
const messages = [];
let running = null;
let modelId = null;

const mode = () => document.querySelector("input[name=mode]:checked").value;
const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));

function settings() {
  return {
    model: modelId ?? undefined,
    temperature: number("temperature"),
    top_p: number("top-p"),
    max_tokens: number("max-tokens"),
    seed: number("seed"),
    stop: $("stop").value ? [$("stop").value.replaceAll("\\n", "\n")] : undefined,
  };
}

function request(text) {
  const wantsLogprobs = $("logprobs").checked;
  if (mode() === "completion") {
    const body = { ...settings(), prompt: text, logprobs: wantsLogprobs ? 5 : undefined };
    return { path: "/v1/completions", body };
  }
  const system = $("system").value.trim();
  const conversation = [...(system ? [{ role: "system", content: system }] : []), ...messages];
  const more = wantsLogprobs ? { logprobs: true, top_logprobs: 5 } : {};
  return { path: "/v1/chat/completions", body: { ...settings(), ...more, messages: conversation } };
}

/** Adds what somebody says to the page; returns the paragraph that its text goes to. */
function show(kind, title, text) {
  $("empty").hidden = true;
  const article = document.createElement("article");
  article.className = kind;
  const heading = document.createElement("h2");
  heading.textContent = title;
  const paragraph = document.createElement("p");
  paragraph.append(text);
  article.append(heading, paragraph);
  log.append(article);
  article.scrollIntoView({ block: "end" });
  return paragraph;
}

function showError(error) {
  const hints = {
    invalid_api_key: "Enter a key of this server under Settings.",
    chat_template_missing: "This model has no chat template: choose Completion above.",
    overloaded: `Try again in ${error.retryAfter ?? "a few"} s.`,
  };
  show("error", "Not answered", [error.message, hints[error.code]].filter(Boolean).join("\n"));
  if (error.code === "invalid_api_key") {
    openPanel(true);
    $("api-key").focus();
  }
}

function setRunning(controller) {
  running = controller;
  $("send").hidden = Boolean(controller);
  $("stop-button").hidden = !controller;
  log.setAttribute("aria-busy", String(Boolean(controller)));
}

async function run(text) {
  const isChat = mode() === "chat";
  if (isChat) {
    messages.push({ role: "user", content: text });
    show("user", "You", text);
  }
  const { path, body } = request(text);
  const controller = new AbortController();
  setRunning(controller);
  const started = performance.now();
  const seen = { text: "", tokens: 0, firstMs: null, usage: null, reason: null };
  let paragraph = null;
  try {
    for await (const chunk of stream(path, body, $("api-key").value, controller.signal)) {
      paragraph ??= begin(isChat, text);
      take(chunk, isChat, paragraph, seen, started);
    }
  } catch (error) {
    if (error.name === "AbortError") seen.reason = "stopped";
    else showError(error);
  } finally {
    paragraph?.parentElement.classList.remove("running");
    setRunning(null);
    finish(isChat, text, seen, started);
  }
}

function begin(isChat, text) {
  const paragraph = show(isChat ? "model running" : "text running", isChat ? "Model" : "Text", "");
  if (!isChat) {
    const given = document.createElement("span");
    given.className = "given";
    given.textContent = text;
    paragraph.append(given);
  }
  if ($("logprobs").checked) {
    paragraph.classList.add("coloured");
    paragraph.tabIndex = 0;
    paragraph.setAttribute("aria-label", "Answer; the arrow keys go from token to token");
  }
  return paragraph;
}

function take(chunk, isChat, paragraph, seen, started) {
  if (chunk.usage) seen.usage = chunk.usage;
  const choice = chunk.choices[0];
  if (!choice) return;
  const text = (isChat ? choice.delta.content : choice.text) ?? "";
  if (text) {
    seen.firstMs ??= performance.now() - started;
    seen.text += text;
    const stage = $("stage");
    const isAtEnd = stage.scrollHeight - stage.scrollTop - stage.clientHeight < 80;
    appendText(paragraph, text, readTokens(choice, isChat));
    if (isAtEnd) stage.scrollTop = stage.scrollHeight;
  }
  seen.reason = choice.finish_reason ?? seen.reason;
}

function finish(isChat, text, seen, started) {
  if (isChat && seen.text) messages.push({ role: "assistant", content: seen.text });
  else if (isChat) messages.pop();
  if (!isChat && seen.text) setPrompt(text + seen.text);
  if (seen.firstMs === null) {
    $("stats").textContent = seen.reason === "stopped" ? "stopped before the first token" : "";
    return;
  }
  const seconds = (performance.now() - started) / 1000;
  const parts = [`first token ${Math.round(seen.firstMs)} ms`];
  if (seen.usage) {
    const { prompt_tokens: given, completion_tokens: made } = seen.usage;
    parts.unshift(`${given} + ${made} tokens`);
    parts.push(`${(made / seconds).toFixed(0)} tokens/s`);
  }
  parts.push({ length: "ended at its length", stop: "ended by itself", stopped: "stopped" }[seen.reason] ?? "");
  $("stats").textContent = parts.filter(Boolean).join(" · ");
}

function setPrompt(text) {
  prompt.value = text;
  fit();
}

function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
  prompt.scrollTop = prompt.scrollHeight;
}

function clear() {
  running?.abort();
  messages.length = 0;
  log.replaceChildren();
  $("empty").hidden = false;
  $("stats").textContent = "";
  setPrompt("");
  prompt.focus();
}

function openPanel(isOpen) {
  $("panel").classList.toggle("open", isOpen);
  $("toggle-panel").setAttribute("aria-expanded", String(isOpen));
}

function applyMode() {
  const isChat = mode() === "chat";
  prompt.placeholder = isChat ? "Write to the model" : "Begin a text that the model goes on with";
  $("empty").firstElementChild.textContent = isChat ? "Say something to the model." : "Begin a text.";
  $("system-field").hidden = !isChat;
  $("send").textContent = isChat ? "Send" : "Continue";
}

function applyTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
}

/** A model of a short context cannot be asked for as much as others. */
function fitLimits(model) {
  const field = $("max-tokens");
  field.max = model.max_model_len - 1;
  if (field.value === field.defaultValue) field.value = Math.min(Number(field.value), Math.floor(model.max_model_len / 2));
}

async function watch() {
  const ready = await isReady();
  $("dot").className = `dot ${ready ? "ready" : "away"}`;
  if (!ready) {
    $("model-name").textContent = modelId ? `${modelId}: not ready` : "not ready";
  } else {
    try {
      const model = await getModel($("api-key").value);
      if (modelId === null) fitLimits(model);
      modelId = model.id;
      $("model-name").textContent = `${model.id} · ${model.max_model_len} tokens`;
    } catch (error) {
      $("model-name").textContent = error.status === 401 ? "needs an API key" : error.message;
    }
  }
  setTimeout(watch, ready ? 15000 : 1000);
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = prompt.value;
  if (running || !text.trim() || !$("max-tokens").reportValidity()) return;
  if (mode() === "chat") setPrompt("");
  run(text);
});
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
prompt.addEventListener("input", fit);
$("stop-button").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", clear);
$("toggle-panel").addEventListener("click", () => openPanel(!$("panel").classList.contains("open")));
$("theme").addEventListener("click", () => {
  const isDark = getComputedStyle(document.documentElement).colorScheme === "dark"
    || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  const theme = isDark ? "light" : "dark";
  localStorage.setItem("theme", theme);
  applyTheme(theme);
});
$("logprobs").addEventListener("change", () => $("legend").classList.toggle("shown", $("logprobs").checked));
$("api-key").value = sessionStorage.getItem("api-key") ?? "";
$("api-key").addEventListener("change", () => {
  sessionStorage.setItem("api-key", $("api-key").value);
  modelId = null;
});
for (const range of document.querySelectorAll("input[type=range]")) {
  range.addEventListener("input", () => (range.parentElement.querySelector("output").value = range.value));
}
for (const radio of document.querySelectorAll("input[name=mode]")) radio.addEventListener("change", applyMode);
addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running) running.abort();
  else if ($("panel").classList.contains("open")) openPanel(false);
  else prompt.focus();
});

explainTokens(log, $("tip"));
applyTheme(localStorage.getItem("theme"));
applyMode();
watch();
