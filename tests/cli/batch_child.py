"""A batch job over a model that only counts, for tests that kill it: no engine, no JAX, answers within milliseconds."""

import asyncio
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from fastgpt_jax.batch.job import Response, run_job
from fastgpt_jax.batch.journal import Journal
from fastgpt_jax.batch.requests import read_requests, survey


async def call(request):
    await asyncio.sleep(random.random() * 0.002)
    text = request.body["prompt"] * 20
    return Response(200, "r", {"choices": [{"text": text}], "usage": {"prompt_tokens": 1, "completion_tokens": 2}})


def main(given, output):
    facts = survey(Path(given))
    with Journal(Path(output), identity={"input": facts.sha256}, last_number=facts.last_number) as journal:
        print(journal.num_done, flush=True)
        asyncio.run(run_job(read_requests(Path(given)), journal, call, window=8))


if __name__ == "__main__":
    main(*sys.argv[1:])
