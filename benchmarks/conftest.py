"""Every saved benchmark says where it ran: processor, threads, versions, build, revision."""

import torch

from ffkernels.info import info

# In float32 both sides compute in float32.
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["featherface"] = info()


def pytest_benchmark_group_stats(config, benchmarks, group_by):
    """One group per shape and mode, so that the rows of a table are what a user would choose between."""
    groups: dict[str, list] = {}
    for row in benchmarks:
        groups.setdefault(row["group"] or row["name"], []).append(row)
    return sorted(groups.items())
