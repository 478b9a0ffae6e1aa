"""Reads the text of `--sparse`; the grammar and what it means are in `passes/sparse_attention/language.py`.

A mistake is one line with the place, what was found there and what may stand there.
"""

from __future__ import annotations

import re
from typing import NamedTuple, NoReturn

from passes.sparse_attention.language import (
    Both,
    Bound,
    Clause,
    Density,
    Either,
    Full,
    Rule,
    Sinks,
    Span,
    Sparsity,
    SparsityError,
    Window,
)

_TOKEN = re.compile(r"\s*(?:(?P<number>-?\d+(?:\.\d*)?(?:[eE]-?\d+)?|-?\.\d+)|(?P<name>[A-Za-z_]+)|(?P<sign>\S))")
MAX_DEPTH = 64  # parentheses in parentheses; far below what recursion allows
ATOMS = ("window(n)", "sinks(n)", "density(d)", "full")
SELECTIONS = ("layers[a:b]", "heads[a:b]", "all")


class _Token(NamedTuple):
    text: str
    kind: str
    position: int

    def __str__(self) -> str:
        return repr(self.text) if self.text else "the end"


def parse_sparsity(text: str) -> Sparsity:
    """The clauses of a text.

    Raises:
      SparsityError: The text is none.
    """
    return _Parser(text).clauses()


class _Parser:
    def __init__(self, text: str):
        self._tokens, self._depth, at = [], 0, 0
        while match := _TOKEN.match(text, at):
            kind = match.lastgroup or ""
            self._tokens.append(_Token(match[kind], kind, match.start(kind) + 1))
            at = match.end()
        self._tokens.append(_Token("", "end", len(text.rstrip()) + 1))

    def clauses(self) -> Sparsity:
        found = []
        while self._next.kind != "end":
            found.append(self._clause())
            if self._next.kind != "end":
                self._expect(";", "';' before the next clause")
        if not found:
            self._fail("a clause such as 'all: window(512) | sinks(8)'")
        return Sparsity(tuple(found))

    # ---------------------------------------------------------------------------------------- one clause
    def _clause(self) -> Clause:
        position = self._next.position
        spans: dict[str, Span | None] = {}
        while self._next.text != ":" or not spans:
            token = self._take()
            if token.text not in ("layers", "heads", "all") or token.text in spans or (spans and "all" in spans):
                wanted = f"a selection of {', '.join(SELECTIONS)}"
                self._fail("':' and a rule, or the other of layers and heads" if spans else wanted, token)
            if token.text == "all" and spans:
                self._fail("':' and a rule, since 'all' stands alone", token)
            spans[token.text] = None if token.text == "all" else self._span()
            if self._next.text == ",":
                self._take()
        self._take()
        return Clause(spans.get("layers"), spans.get("heads"), self._rule(), position)

    def _span(self) -> Span:
        self._expect("[", "'[' and bounds, as in [0:half]")
        start = None if self._next.text == ":" else self._bound()
        if self._next.text == "]" and start is not None:
            self._take()
            return Span(start, is_one=True)
        self._expect(":", "':' between the bounds, or ']'")
        stop = None if self._next.text == "]" else self._bound()
        self._expect("]", "']' behind the bounds")
        return Span(start, stop)

    def _bound(self) -> Bound:
        token = self._take()
        if token.text == "half":
            return Bound(is_half=True)
        if not re.fullmatch(r"-?\d+", token.text):
            self._fail("a whole number or 'half'", token)
        return Bound(int(token.text))

    # ---------------------------------------------------------------------------------------- rules
    def _rule(self) -> Rule:
        rule = self._product()
        while self._next.text == "|":
            self._take()
            rule = Either(rule, self._product())
        return rule

    def _product(self) -> Rule:
        rule = self._atom()
        while self._next.text == "&":
            self._take()
            rule = Both(rule, self._atom())
        return rule

    def _atom(self) -> Rule:
        token = self._take()
        if token.text == "(":
            self._depth += 1
            if self._depth > MAX_DEPTH:
                self._fail(f"a rule in at most {MAX_DEPTH} parentheses", token)
            rule = self._rule()
            self._depth -= 1
            self._expect(")", "')', or '&' or '|' and another rule")
            return rule
        if token.text == "full":
            return Full()
        if token.text == "density":
            share = self._argument("a share above 0 and at most 1, as in density(0.3)", is_whole=False)
            return Density(share)
        if token.text == "window":
            return Window(int(self._argument("a whole number of at least 1, as in window(512)")))
        if token.text == "sinks":
            return Sinks(int(self._argument("a whole number of at least 1, as in sinks(8)")))
        self._fail(f"a rule of {', '.join(ATOMS)}", token)

    def _argument(self, wanted: str, *, is_whole: bool = True) -> float:
        self._expect("(", f"'(' and {wanted}")
        token = self._take()
        is_number = token.kind == "number" and (not is_whole or token.text.lstrip("-").isdigit())
        if not is_number or not (float(token.text) >= 1 if is_whole else 0 < float(token.text) <= 1):
            self._fail(wanted, token)
        self._expect(")", "')'")
        return float(token.text)

    # ---------------------------------------------------------------------------------------- tokens
    @property
    def _next(self) -> _Token:
        return self._tokens[0]

    def _take(self) -> _Token:
        return self._tokens.pop(0) if self._next.kind != "end" else self._next

    def _expect(self, text: str, wanted: str) -> None:
        if self._next.text != text:
            self._fail(wanted)
        self._take()

    def _fail(self, wanted: str, token: _Token | None = None) -> NoReturn:
        found = self._next if token is None else token
        raise SparsityError(f"at character {found.position}: there must be {wanted}, got {found}")
