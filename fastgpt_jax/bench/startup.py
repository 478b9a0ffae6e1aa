"""One process from its start to its first token: `python -m fastgpt_jax.bench.startup ARTIFACT VERIFY FINGERPRINT`.

Prints one JSON object: when, in seconds of the monotonic clock, JAX was imported, the artifact was loaded and the first
token was there, and how long the parts of loading took. Nothing is imported that a user's process would not import.
"""

from __future__ import annotations

import json
import sys
import time


def main(artifact: str, verify: str, fingerprint: str) -> None:
    """Serves one token."""
    stamps = {"interpreter": time.monotonic()}
    import jax  # noqa: F401, PLC0415 - its import is a part of what is measured

    stamps["import jax"] = time.monotonic()
    from fastgpt_jax.artifact.loading import load_artifact  # noqa: PLC0415
    from fastgpt_jax.engine.llm import LLM  # noqa: PLC0415
    from fastgpt_jax.sampling.params import SamplingParams  # noqa: PLC0415

    stamps["imports"] = time.monotonic()
    served = load_artifact(artifact, verify=verify, on_mismatch="refuse", check_fingerprint=fingerprint == "yes")  # pyright: ignore[reportArgumentType]
    llm = LLM(served)
    stamps["load"] = time.monotonic()
    prompt = list(range(1, 1 + max(3, served.min_first_chunk)))
    llm.generate(
        prompt_token_ids=prompt,
        sampling_params=SamplingParams(temperature=0, max_tokens=1, ignore_eos=True),
        use_tqdm=False,
    )
    stamps["first token"] = time.monotonic()
    print(json.dumps({"stamps": stamps, "parts": served.seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
