"""What workers ask of the cluster, and which wishes cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.options import ServeOptions
from cluster.placement import WorkerSpec, placement_problem, total
from homer.errors import ConfigError
from homer.load_options import LoadOptions


def test_workers_on_the_cpu_take_their_threads() -> None:
    options = ServeOptions(model="", cpu=True, workers=2, threads=4)
    assert [spec.bundle for spec in options.initial] == [{"CPU": 4}] * 2


def test_a_share_of_a_gpu_with_constraints_and_workers_on_the_cpu_beside() -> None:
    options = ServeOptions(
        model="",
        workers=2,
        gpus_per_worker=0.5,
        cpu_workers=1,
        threads=8,
        resources={"accelerator_type:A100": 0.01},
        labels={"ray.io/market-type": "!spot"},
    )
    gpu = {"CPU": 1, "GPU": 0.5, "accelerator_type:A100": 0.01}
    assert [spec.bundle for spec in options.initial] == [gpu, gpu, {"CPU": 8}]
    assert [spec.labels for spec in options.initial] == [options.labels, options.labels, {}]
    assert total(options.initial) == {"CPU": 10, "GPU": 1, "accelerator_type:A100": 0.02}


def test_a_fixed_pool_is_one_group() -> None:
    options = ServeOptions(model="", workers=3, cpu_workers=1, placement="strict-spread")
    places = [options.place(number) for number in range(4)]
    assert {place.group for place in places} == {"workers"}
    assert [place.index for place in places] == [0, 1, 2, 3]
    assert all(len(place.specs) == 4 and place.placement == "strict-spread" for place in places)


def test_workers_that_come_and_go_have_places_of_their_own() -> None:
    options = ServeOptions(model="", workers=1, cpu_workers=1, threads=2, max_workers=4)
    groups = [options.place(number).group for number in range(3)]
    assert len(set(groups)) == 3
    # Number 1 is the one on the CPU; later ones are like the first.
    assert [options.spec(number).gpus for number in range(3)] == [1, 0, 1]
    spread = ServeOptions(model="", workers=1, max_workers=4, placement="spread")
    assert not spread.place(0).specs


def test_workers_are_told_their_budget_and_share() -> None:
    options = ServeOptions(
        model="m", workers=2, gpus_per_worker=0.5, cpu_workers=1, threads=4, memory_budget="3GiB"
    )
    told = [
        options.worker_options(spec, name=f"worker-{number}", host="10.0.0.7", node_cpus=8)
        for number, spec in enumerate(options.initial)
    ]
    assert [one.memory_budget for one in told] == ["3GiB"] * 3
    assert [one.memory_share for one in told] == [0.5, 0.5, 1.0]
    assert [(one.load.device, one.threads) for one in told] == [
        ("cuda:0", 0),
        ("cuda:0", 0),
        ("cpu", 4),
    ]
    assert (told[2].model, told[2].name, told[2].host) == ("m", "worker-2", "10.0.0.7")


def test_a_worker_with_several_gpus_spreads_its_layers_over_them() -> None:
    two = ServeOptions(model="m", gpus_per_worker=2)
    assert two.main_spec.bundle == {"CPU": 1, "GPU": 2}
    told = two.worker_options(two.main_spec, name="", host="", node_cpus=8)
    assert (told.load.device, told.load.device_map, told.memory_share) == ("auto", "auto", 1.0)
    limits = LoadOptions(device_map="sequential", max_memory='{"0": "20GiB"}')
    for given, device in (({"gpus_per_worker": 1}, "auto"), ({"cpu": True}, "cpu")):
        options = ServeOptions(model="m", load=limits, **given)
        load = options.worker_options(options.main_spec, name="", host="", node_cpus=8).load
        assert (load.device, load.device_map, load.max_memory) == (
            device, "sequential", limits.max_memory,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "node_cpus", "share"),
    [
        ({"workers": 4}, 64, 1 / 4),
        # A node has room for no more of them.
        ({"workers": 4, "threads": 8}, 16, 1 / 2),
        ({"workers": 4, "threads": 8}, 8, 1),
        # Those that may join later are counted.
        ({"workers": 1, "max_workers": 5}, 64, 1 / 5),
        ({"workers": 4, "placement": "strict-spread"}, 64, 1),
    ],
)
def test_workers_on_the_cpu_share_the_memory_of_their_node(
    given: dict[str, Any], node_cpus: float, share: float
) -> None:
    options = ServeOptions(model="", cpu=True, **given)
    told = options.worker_options(options.spec(0), name="", host="", node_cpus=node_cpus)
    assert told.memory_budget == "auto"
    assert told.memory_share == pytest.approx(share)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"workers": 0}, "workers is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"port": -1}, "port is"),
        ({"min_workers": 0}, "min_workers is 0"),
        ({"min_workers": 3}, "workers is 2; use one from min_workers, 3"),
        ({"max_workers": 1}, "to max_workers, 1"),
        ({"cpu_workers": -1}, "cpu_workers is -1"),
        ({"cpu": True, "cpu_workers": 1}, "with cpu use workers alone"),
        ({"gpus_per_worker": 0}, "gpus_per_worker is 0"),
        ({"gpus_per_worker": 1.5}, "use whole GPUs, over which layers"),
        ({"gpus_per_worker": 2, "engine": "deepspeed-zero3"}, "each of 1 ranks needs a GPU"),
        ({"gpus_per_worker": 2, "load": LoadOptions(adapter="lora")}, "merge it into a checkpoint"),
        ({"cpu_workers": 1, "load": LoadOptions(device_map="auto")}, "leave cpu_workers out"),
        ({"leaf_workers": 1, "load": LoadOptions(device_map='{"": 0}')}, "use device_map auto"),
        ({"placement": "scatter"}, "placement is 'scatter'; use pack, spread"),
        ({"placement": "strict-pack", "max_workers": 3}, "which a pool that grows"),
        ({"resources": {"GPU": 1}}, "resources ask for 1 GPU"),
        ({"resources": {"disk": 0}}, "resources ask for 0 disk"),
        ({"grace_seconds": -1}, "grace_seconds is -1"),
        ({"memory_budget": "much"}, "'much' is no amount of memory"),
    ],
)
def test_options_out_of_range(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServeOptions(model="", **{"workers": 2, **given})


def test_no_gpu_suggests_the_cpu() -> None:
    specs = ServeOptions(model="", workers=3).initial
    error = placement_problem(specs, "pack", {"CPU": 8}, {"CPU": 2}, nodes=2)
    assert "no room for 3 worker(s) of 1 CPU, 1 GPU each" in str(error)
    assert "of 2 node(s) has 8 CPU (2 free), 0 GPU (0 free)" in str(error)
    assert str(error).endswith("lower --workers, or use --cpu")


def test_a_wish_that_no_node_fulfils_is_named() -> None:
    specs = [WorkerSpec(gpus=1, labels={"zone": "a"}), WorkerSpec(cpus=4)]
    error = placement_problem(specs, "strict-pack", {"CPU": 8, "GPU": 1}, {"CPU": 8}, nodes=1)
    assert (
        "no room for 1 worker(s) of 1 CPU, 1 GPU on a node with zone=a each and 1 worker(s) of "
        "4 CPU each, all on one node: " in str(error)
    )
