"""Lets torchtitan 0.3 run on CPUs with gloo: it takes its device from an accelerator, and knows no CPU.

Import it before torchtitan. It also stands in for ``datasets``, which torchtitan imports and these tests do not use.
"""

import importlib.util
import inspect
import sys
import types
from typing import Any

import torch
import torch._utils


class _Cpu(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)


_cpu: Any = _Cpu("cpu")
_cpu.get_device_name = lambda device=None: "CPU"
_cpu.current_device = lambda: 0
_cpu.get_device_properties = lambda device=None: types.SimpleNamespace(total_memory=2**33, name="CPU")
_cpu.reset_peak_memory_stats = lambda *args: None
_cpu.empty_cache = lambda *args: None
_cpu.memory_stats = lambda device=None: {}
_cpu.set_device = lambda device: None
_cpu.device_count = lambda: 1
_cpu.synchronize = lambda *args: None
torch._utils._get_available_device_type = lambda: "cpu"
torch._utils._get_device_module = lambda device: _cpu
torch.set_num_threads(1)

if importlib.util.find_spec("datasets") is None:
    for name, members in (
        ("datasets", ("Dataset", "load_dataset")),
        ("datasets.distributed", ("split_dataset_by_node",)),
    ):
        module: Any = types.ModuleType(name)
        for member in members:
            setattr(module, member, object)
        sys.modules[name] = module

import torchtitan.distributed.utils  # noqa: E402
import torchtitan.models.common.config_utils  # noqa: E402
from torch.distributed.fsdp import FSDPModule  # noqa: E402
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle  # noqa: E402
from torchtitan.models.common.attention import ScaledDotProductAttention  # noqa: E402

# FlexAttention has no backward pass on CPUs.
ScaledDotProductAttention.sdpa_backends = [torch.nn.attention.SDPBackend.MATH]
torchtitan.models.common.config_utils.get_attention_config = lambda backend: ScaledDotProductAttention.Config()
torchtitan.distributed.utils.set_pg_timeouts = lambda **kwargs: None

_divide = FSDPModule.set_gradient_divide_factor


def _sum_instead(self: Any, factor: float) -> None:
    _divide(self, factor)
    self.set_force_sum_reduction_for_comms(True)  # gloo cannot average


FSDPModule.set_gradient_divide_factor = _sum_instead


def _take_microbatches(schedule: Any) -> None:
    """Let a schedule of torch 2.13 take batches that are split already, as torchtitan gives them to a newer torch."""
    step = schedule.step

    def microbatched(
        self: Any, *args: Any, arg_mbs: Any = None, kwarg_mbs: Any = None, target_mbs: Any = None, **rest: Any
    ) -> Any:
        if kwarg_mbs is None:
            return step(self, *args, **rest)
        run = self._step_microbatches
        self._split_inputs = lambda *_: (arg_mbs or [()] * len(kwarg_mbs), kwarg_mbs)
        self._step_microbatches = lambda split, named, _, *others, **more: run(
            split, named, target_mbs, *others, **more
        )
        try:
            return step(self, **rest)
        finally:
            del self._split_inputs, self._step_microbatches

    schedule.step = microbatched


if "arg_mbs" not in inspect.signature(PipelineScheduleSingle.step).parameters:
    _take_microbatches(PipelineScheduleSingle)
    _take_microbatches(PipelineScheduleMulti)
