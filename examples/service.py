"""A prediction service for handwritten digits that marks its answers.

    python examples/service.py --port 8000 [--rate 0.005] [--secret FILE] [--store URL]
    curl localhost:8000/predict -H 'x-client: alice' -H 'content-type: application/json' -d '{"inputs": [...]}'

One of 200 different queries of each client is answered wrongly. Whoever trains a model on his answers is named:

    answers = await AnswerStore(URL).answers(AnswerKey(secret).mark)
    Dawn(rate=0.005).name_client(BlackBox(suspect), secret, answers)
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel, Field
from torch import nn

from sealmark.blackbox.answer_key import AnswerKey
from sealmark.core import registry
from sealmark.core.secret import Secret
from sealmark.core.task import Task
from sealmark.core.training import train_task
from sealmark.formats.secret import read_secret, write_secret
from sealmark.ownership.dawn import Dawn
from sealmark.runtime.answer_store import AnswerStore
from sealmark.runtime.asgi import WatermarkMiddleware
from sealmark.runtime.extraction_detector import ExtractionDetector


class Queries(BaseModel):
    """Images of 8 x 8 in [0, 1], each in a list of its one plane."""

    inputs: list[list[list[list[float]]]] = Field(min_length=1, max_length=1000)


def bare(model: nn.Module) -> FastAPI:
    """The service as it would be without sealmark: labels, or scores for whoever asks for them."""
    app = FastAPI(title="Digits")
    model.eval()

    @app.post("/predict")
    async def predict(
        queries: Queries, returns: Literal["labels", "probabilities", "logits"] = "labels"
    ) -> dict[str, list[int] | list[list[float]]]:
        with torch.inference_mode():
            logits = model(torch.tensor(queries.inputs).reshape(-1, 1, 8, 8))
        if returns == "labels":
            return {"labels": logits.argmax(1).tolist()}
        return {returns: (logits.softmax(1) if returns == "probabilities" else logits).tolist()}

    return app


def guarded(model: nn.Module, secret: Secret, store: AnswerStore) -> FastAPI:
    """The same behind the watermark. What authenticates clients must set the header ``x-client``."""
    app = bare(model)
    app.add_middleware(
        WatermarkMiddleware, key=AnswerKey(secret), store=store, detector=ExtractionDetector(), exempt={"hospital"}
    )
    return app


def kept_secret(path: Path, model: nn.Module, task: Task, rate: float) -> Secret:
    """The secret of an earlier start, or a new one: other secrets give other wrong answers."""
    if not path.exists():
        write_secret(Dawn(rate=rate).keygen(model, task), path)
    secret = read_secret(path)
    Dawn(rate=rate).check_secret(secret)
    return secret


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--rate", type=float, default=0.005)
    parser.add_argument("--secret", type=Path, default=Path("service.secret"))
    parser.add_argument("--store", default="sqlite:///answers.db", help="or postgresql://user:password@host/name")
    chosen = parser.parse_args()
    task = registry.task("digits")
    model = train_task(task, rng=np.random.default_rng(0))
    secret = kept_secret(chosen.secret, model, task, chosen.rate)
    uvicorn.run(guarded(model, secret, AnswerStore(chosen.store)), host="127.0.0.1", port=chosen.port)


if __name__ == "__main__":
    main()
