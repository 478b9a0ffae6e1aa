"""Text to token ids and back, over the `tokenizers` library.

Knows neither files nor chats. The one idea: the library's tokenizer decides everything but two things that lie outside
its file: which tokens begin and end a text, and how text is decoded while ids still arrive.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from fastgpt_jax.errors import UserError
from fastgpt_jax.tokenizer.detokenizer import Detokenizer


class Tokenizer:
    """A tokenizer with its special tokens. Invariant: the special ids are in its vocabulary."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None = None,
        eos_token_ids: tuple[int, ...] = (),
        add_bos: bool = False,
    ):
        """Args:
        backend: The library's tokenizer; truncation and padding are switched off.
        add_bos: Whether a text begins with the BOS token even where `backend` does not put it there.
        """
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._prefix_ids = [bos_token_id] if add_bos and bos_token_id is not None else []
        self.add_bos = add_bos
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids

    def save(self, path: Path) -> None:
        """Writes the library's tokenizer.json; the arguments besides `backend` are the caller's to keep."""
        self._backend.save(str(path))

    def describe(self) -> str:
        """Returns the library's tokenizer.json as text."""
        return self._backend.to_str()

    @property
    def vocab_size(self) -> int:
        """Tokens in all, added ones included; the model's logits may be wider."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token(self) -> str | None:
        return None if self.bos_token_id is None else self.token(self.bos_token_id)

    @property
    def eos_token(self) -> str | None:
        return self.token(self.eos_token_ids[0]) if self.eos_token_ids else None

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """How special tokens are spelled, with their ids."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items() if token.special}

    @cached_property
    def unknown_token_id(self) -> int | None:
        """What stands for text that the vocabulary cannot spell; None where there is no such text."""
        token = getattr(self._backend.model, "unk_token", None)
        return None if token is None else self._backend.token_to_id(token)

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """Ids that steer the model and have no text of their own."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    def token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it, None for an id outside the vocabulary."""
        return self._backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
          add_special_tokens: Whether the tokens that begin (or end) a text are put around it.
          parse_special: Whether special tokens spelled out in the text are these tokens, rather than text.
        """
        backend = self._backend if parse_special else self._plain_backend
        try:
            ids = backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise UserError(f"a text to encode must be valid Unicode, got {ascii(text)[:80]}") from error
        if add_special_tokens and ids[: len(self._prefix_ids)] != self._prefix_ids:
            return self._prefix_ids + ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids outside the vocabulary have none."""
        shown = [token_id for token_id in ids if self._is_shown(token_id, skip_special_tokens)]
        return self._backend.decode(shown, skip_special_tokens=False)

    def detokenizer(self, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()) -> Detokenizer:
        """Starts a stream of ids into text.

        Args:
          prompt_ids: What the stream continues. Its text is not given out, but the stream knows that it does not begin
            a text: a leading space of the first new token stays.
        """
        detokenizer = Detokenizer(
            decode=lambda ids: self._backend.decode(ids, skip_special_tokens=False),
            is_shown=lambda token_id: self._is_shown(token_id, skip_special_tokens),
            byte_token_ids=self._byte_token_ids,
        )
        detokenizer.add(prompt_ids)
        return detokenizer

    @cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        """A second tokenizer, to which a special token in a text is text: the switch for it is no argument."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = True
        return backend

    def _is_shown(self, token_id: int, skip_special_tokens: bool) -> bool:
        if skip_special_tokens and token_id in self.special_token_ids:
            return False
        return self.token(token_id) is not None

    @cached_property
    def _byte_token_ids(self) -> frozenset[int]:
        """Ids of `<0x00>` to `<0xFF>` where the decoder reads them as bytes."""
        probe = self._backend.token_to_id("<0x41>")
        if probe is None or self._backend.decode([probe], skip_special_tokens=False) != "A":
            return frozenset()
        ids = (self._backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(token_id for token_id in ids if token_id is not None)
