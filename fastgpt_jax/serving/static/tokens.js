// Shows tokens in the colour of their log-probability, and what else was likely, to the mouse and to the keyboard.

/** What a chunk says of its tokens, in one form for chats and completions: {text, logprob, top: [[text, logprob]]}. */
export function readTokens(choice, isChat) {
  const told = choice.logprobs;
  if (!told) return [];
  if (isChat) {
    return (told.content ?? []).map((one) => ({
      text: one.token,
      logprob: one.logprob,
      top: one.top_logprobs.map((other) => [other.token, other.logprob]),
    }));
  }
  return told.tokens.map((text, index) => ({
    text,
    logprob: told.token_logprobs[index],
    top: Object.entries(told.top_logprobs?.[index] ?? {}).sort((a, b) => b[1] - a[1]),
  }));
}

/** Adds text to a paragraph; its tokens one by one where they are known and spell it, else as one. */
export function appendText(paragraph, text, tokens) {
  if (!text) return;
  if (!tokens.length) {
    paragraph.append(text);
    return;
  }
  const spelled = tokens.map((token) => token.text).join("");
  const fits = tokens.length > 1 && spelled === text;
  const least = tokens.reduce((a, b) => (b.logprob < a.logprob ? b : a));
  const pieces = fits ? tokens : [{ ...(tokens.length === 1 ? tokens[0] : least), text }];
  for (const piece of pieces) paragraph.append(makeToken(piece));
}

function makeToken(token) {
  const span = document.createElement("span");
  span.className = "token";
  span.textContent = token.text;
  const share = Math.min(1, -token.logprob / 5);
  span.style.setProperty("--doubt-share", (100 * share).toFixed(1));
  span.told = token;
  return span;
}

const percent = (logprob) => {
  const value = 100 * Math.exp(logprob);
  return value >= 0.1 ? `${value.toFixed(1)}%` : "<0.1%";
};
const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "∅";

/** The list beside a token: itself first, then what was likelier or nearly so. */
function fillTip(tip, token) {
  const rows = [[token.text, token.logprob, true], ...token.top.filter(([text]) => text !== token.text).map((row) => [...row, false])];
  tip.replaceChildren(
    ...rows.map(([text, logprob, isOwn]) => {
      const row = document.createElement("div");
      row.className = isOwn ? "own" : "";
      const [name, share] = [document.createElement("span"), document.createElement("span")];
      name.textContent = visible(text);
      share.textContent = percent(logprob);
      row.append(name, share);
      return row;
    }),
  );
}

/** Lets the mouse, or arrow keys in a focused paragraph, choose the token that `tip` tells of. */
export function explainTokens(root, tip) {
  let current = null;

  function choose(span) {
    current?.classList.remove("current");
    current = span;
    tip.hidden = !span;
    if (!span) return;
    span.classList.add("current");
    fillTip(tip, span.told);
    const box = span.getBoundingClientRect();
    const below = box.bottom + tip.offsetHeight + 12 < innerHeight;
    tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${below ? box.bottom + 6 : box.top - tip.offsetHeight - 6}px`;
  }

  root.addEventListener("mouseover", (event) => choose(event.target.closest(".coloured .token")));
  root.addEventListener("mouseleave", () => choose(null));
  root.addEventListener("focusout", () => choose(null));
  root.addEventListener("keydown", (event) => {
    const paragraph = event.target.closest(".coloured");
    const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
    if (!paragraph || !(event.key in steps)) return;
    const spans = [...paragraph.querySelectorAll(".token")];
    if (!spans.length) return;
    event.preventDefault();
    const from = spans.indexOf(current);
    choose(spans[Math.max(0, Math.min(from + steps[event.key], spans.length - 1))]);
    current.scrollIntoView({ block: "nearest" });
  });
}
