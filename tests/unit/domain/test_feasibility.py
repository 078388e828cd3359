"""What a cluster cannot run is said in words: what is asked for, and the most that there is."""

from __future__ import annotations

import pytest

from koan_ray.domain.feasibility import Node, unmet
from koan_ray.domain.records import ActorSpec

GIB = 2**30
PLAIN = Node({"CPU": 4.0, "memory": 8.0 * GIB, "node:10.0.0.1": 1.0}, {"region": "eu", "ray.io/node-id": "a"})
BIG = Node({"CPU": 64.0, "memory": 256.0 * GIB}, {"region": "us", "market": "spot"})
GPU = Node({"CPU": 8.0, "GPU": 2.0, "memory": 32.0 * GIB, "licence": 1.0}, {"region": "eu"})
CLUSTER = [PLAIN, BIG, GPU]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (ActorSpec(), None),
        (ActorSpec(num_cpus=64, memory=200 * GIB), None),
        (ActorSpec(num_gpus=2.0), None),
        (ActorSpec(num_gpus=0.5, custom=(("licence", 1.0),)), None),
        (ActorSpec(num_cpus=0.0, lead=True), None),
        (ActorSpec(num_cpus=65), "CPU: 65 (the most is 64)"),
        (ActorSpec(num_gpus=3), "GPU: 3 (the most is 2)"),
        (ActorSpec(custom=(("TPU", 1.0),)), "TPU: 1 (none has any)"),
        (ActorSpec(memory=300 * GIB), "memory: 300 GiB (the most is 256 GiB)"),
        (ActorSpec(num_gpus=3, custom=(("TPU", 1.0),)), "GPU: 3 (the most is 2) and TPU: 1 (none has any)"),
        (ActorSpec(num_cpus=32, num_gpus=1), "CPU: 32 and GPU: 1 together"),
        (ActorSpec(label_selector=(("region", "asia"),)), "the label region=asia (there is eu, us)"),
        (ActorSpec(label_selector=(("zone", "a"),)), "the label zone=a (none has this label)"),
        (
            ActorSpec(label_selector=(("market", "spot"), ("region", "eu"))),
            "the label market=spot (there is spot) and the label region=eu (there is eu, us) together",
        ),
        (ActorSpec(num_gpus=1, label_selector=(("region", "us"),)), "the label region=us and CPU: 1 and GPU: 1 together"),
    ],
)
def test_what_no_node_has_is_named_with_the_most_that_there_is(spec, said):
    expected = None if said is None else f"no node of the cluster has {said}; waits until one joins"
    assert unmet(spec, CLUSTER) == expected


@pytest.mark.parametrize(
    ("selector", "fits"),
    [("eu", True), ("asia", False), ("!eu", True), ("in(asia, us)", True), ("in(asia,africa)", False),
     ("!in(eu, us)", False), ("!in(eu, asia)", True)],
)  # fmt: skip
def test_labels_are_selected_as_ray_selects_them(selector, fits):
    assert (unmet(ActorSpec(label_selector=(("region", selector),)), CLUSTER) is None) is fits


def test_a_node_without_a_label_is_none_of_what_is_not_wanted():
    assert unmet(ActorSpec(label_selector=(("market", "!spot"),)), [PLAIN]) is None


def test_nothing_is_said_of_a_cluster_that_is_not_known():
    assert unmet(ActorSpec(num_gpus=100), []) is None
