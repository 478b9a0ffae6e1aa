"""The offline entry: prompts in, finished continuations out, or a stream of them. vLLM's `LLM` in name and meaning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fastgpt_jax.engine.args import make_engine_args
from fastgpt_jax.engine.engine import LLMEngine
from fastgpt_jax.engine.offline import Params
from fastgpt_jax.engine.outputs import EmbeddingOutput, RequestOutput
from fastgpt_jax.engine.prompts import Prompt


class LLM:
    """A model ready to continue prompts.

    `LLM(model, **engine_args)`: `model` is a folder, a loaded model or a compiled one; see `EngineArgs` for the rest.
    """

    def __init__(self, model: Any, **engine_args: Any):
        self.llm_engine = LLMEngine.from_engine_args(make_engine_args(model, engine_args))

    def get_tokenizer(self) -> Any:
        """Returns the model's tokenizer, or None."""
        return self.llm_engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: Params | None = None,
        *,
        prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continues every prompt; returns the results in the order of the prompts.

        All prompts are checked before any is run, so that a mistake in one costs no work on the others.

        Raises:
          UserError: A prompt or its parameters cannot be served; the message says which prompt.
        """
        return self.llm_engine.generate(prompts, sampling_params, prompt_token_ids=prompt_token_ids, use_tqdm=use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        *,
        prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        use_tqdm: bool = True,
    ) -> list[EmbeddingOutput]:
        """Makes a vector of every prompt; returns them in the order of the prompts.

        Raises:
          UserError: The model has no embeddings, or a prompt cannot be served; the message says which prompt.
        """
        return self.llm_engine.embed(prompts, prompt_token_ids=prompt_token_ids, use_tqdm=use_tqdm)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: Params | None = None,
        *,
        prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Continues every prompt; yields the prompt's index and all it has so far, after each of its tokens.

        A text only ever grows from one output to the next. Leaving the iteration early aborts what is unfinished.
        """
        return self.llm_engine.stream(prompts, sampling_params, prompt_token_ids=prompt_token_ids)
