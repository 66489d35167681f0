"""The scaling benchmark's model of many GPUs has known answers."""

import sys

import pytest
from conftest import REPOSITORY

sys.path.append(str(REPOSITORY / "benchmarks"))
from scaling_model import Links, Step, all_reduce_s, bucketed_s, efficiency, flat_s, limit, ring_bytes, rows, scalar_s

NO_LATENCY = Links(node_latency_us=0, network_latency_us=0, memory_gb_s=float("inf"))


def test_without_gradients_to_send_every_gpu_is_used_in_full():
    for num_gpus in (1, 8, 64, 512):
        step = Step(0.1, 0)
        assert flat_s(step, num_gpus, Links()) == bucketed_s(step, num_gpus, Links()) == 0
        assert efficiency(0.1, flat_s(step, num_gpus, Links())) == 1
    assert limit(Step(0.1, 0), Links()) is None


def test_one_gpu_has_nobody_to_send_to():
    assert flat_s(Step(0.1, 1e9, num_scalars=2), 1, Links()) == 0
    assert bucketed_s(Step(0.1, 1e9, num_scalars=2), 1, Links()) == 0


def test_a_ring_sends_all_but_one_part_twice():
    assert ring_bytes(100.0, 2) == 100
    assert ring_bytes(100.0, 4) == 150


def test_where_bandwidth_limits_the_slowest_link_of_the_ring_sets_the_time():
    # 4 GB among 8 GPUs: 2 · 7/8 · 4 GB at 450 GB/s; among 16, which are two nodes, 2 · 15/16 · 4 GB at 50 GB/s.
    assert all_reduce_s(4e9, 8, NO_LATENCY) == pytest.approx(7e9 / 450e9)
    assert all_reduce_s(4e9, 16, NO_LATENCY) == pytest.approx(7.5e9 / 50e9)
    assert efficiency(0.15, flat_s(Step(0.15, 4e9), 16, NO_LATENCY)) == pytest.approx(0.5)


def test_latency_counts_the_rounds_of_the_ring_and_the_tree_of_small_messages():
    links = Links(node_latency_us=1, network_latency_us=10, node_gb_s=float("inf"), network_gb_s=float("inf"))
    assert all_reduce_s(1, 8, links) == pytest.approx(14e-6)
    assert all_reduce_s(1, 32, links) == pytest.approx((62 - 6) * 1e-6 + 6 * 10e-6)  # 4 nodes: 6 hops between them
    assert scalar_s(32, links) == pytest.approx(2 * (7 * 1 + 2 * 10) * 1e-6)


def test_copies_into_one_message_and_back_read_and_write_the_gradients_twice():
    links = Links(node_latency_us=0, node_gb_s=float("inf"), memory_gb_s=1000)
    assert flat_s(Step(0.1, 1e9), 8, links) == pytest.approx(4e-3)


def test_buckets_hide_all_but_the_last_behind_the_backward():
    hidden = Step(compute_s=3.0, gradient_bytes=4e9, bucket_bytes=1e9)  # a bucket every 0.5 s, 4 of them
    assert bucketed_s(hidden, 16, NO_LATENCY) == pytest.approx(7.5e9 / 50e9 / 4)
    # With no computing to hide behind, buckets take what one message takes.
    assert bucketed_s(Step(0.0, 4e9, bucket_bytes=1e9), 16, NO_LATENCY) == pytest.approx(7.5e9 / 50e9)
    # 0.0375 s a bucket, one every 0.0275 s: the fourth waits 3 · 0.01 s longer.
    slower = Step(compute_s=0.165, gradient_bytes=4e9, bucket_bytes=1e9)
    assert bucketed_s(slower, 16, NO_LATENCY) == pytest.approx(0.0375 + 0.03)


def test_the_limit_and_the_shortest_step_are_where_nine_tenths_are_left():
    step = Step(1.0, 4e9)
    number = limit(step, NO_LATENCY)
    assert number == 16  # 0.15 s of 1.15 s; 8 within a node take 0.016 s
    [row] = rows(step, NO_LATENCY, [number])
    shortest = row["shortest_step_s"]
    assert efficiency(shortest, flat_s(Step(shortest, 4e9), number, NO_LATENCY)) == pytest.approx(0.9)
    assert limit(step, NO_LATENCY, bucketed=True) is None
