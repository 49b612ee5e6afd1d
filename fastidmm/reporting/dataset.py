"""A run's dataset, as far as it is still the one that the run learnt from."""

from dataclasses import dataclass

import torch

from fastidmm.assemble import same_images, training_rows
from fastidmm.errors import FastidmmError
from fastidmm.reporting.commands import Stage
from fastidmm.store import Store, folder_of, open_store, read_json


@dataclass(frozen=True, slots=True)
class Data:
    """A run's dataset as it stands now; without a store, the reason."""

    store: Store | None
    problem: str
    learnable: bool  # there are classes to tell apart
    scorable: bool  # and a test split to do it on
    source: str = ""
    num_test: int = 0
    most_frequent: float | None = None  # the largest class's share of the test images


def data_of(stage: Stage) -> Data:
    """The dataset, where it is still the one of the run."""
    dataset = stage.record.recipe.run.dataset
    try:
        store, folder = training_rows(stage.record.recipe), folder_of(dataset)
        same_images(stage.record, store.fingerprint)
        described = read_json(folder)
        has_test = "test" in described["splits"]
        labels = open_store(folder, "test").label if has_test else torch.zeros(0)
    except FastidmmError as problem:
        # Only where there are labels is kNN among the metrics.
        labelled = any("knn_top1" in line for line in stage.lines)
        return Data(None, str(problem), learnable=labelled, scorable=labelled)
    scorable = store.learnable and has_test and bool((labels >= 0).all())
    return Data(
        store,
        problem="",
        learnable=store.learnable,
        scorable=scorable,
        source=described.get("source", {}).get("description", ""),
        num_test=len(labels),
        most_frequent=float(labels.bincount().max() / len(labels)) if scorable else None,
    )
