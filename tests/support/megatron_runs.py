"""What the processes of ``ranks.Ranks`` do with Megatron-core, on CPUs."""

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.utils._pytree import tree_leaves

HALF_LIFE, DECAY = "3ba", 0.5 ** (1 / 3)
VOCABULARY, LENGTH = 32, 8


@dataclass(frozen=True)
class Kind:
    """A layout.

    Args:
        size: World size.
        tp: Tensor-parallel ranks.
        pp: Pipeline stages.
        ep: Expert-parallel ranks.
        experts: Whether the model has experts.
        virtual: Chunks of the model on a rank.
        dtype: Of the model.
        distributed: Whether the data-parallel ranks divide the masters.
        overlap: Whether weights are gathered during the next forward pass.
        instances: How many times the masters are divided over some of the data-parallel ranks.
        tied: Whether the output layer has the embedding's weights.
        offload: Whether the average is kept in CPU memory, and updated in the background.
    """

    size: int = 2
    tp: int = 1
    pp: int = 1
    ep: int = 1
    experts: bool = False
    virtual: int = 1
    dtype: torch.dtype = torch.bfloat16
    distributed: bool = True
    overlap: bool = False
    instances: int = 1
    tied: bool = False
    offload: bool = False


KINDS = {
    "dp 2": Kind(),
    "dp 2, overlap": Kind(overlap=True),
    "dp 2, offloaded average": Kind(offload=True),
    "dp 2, replicated": Kind(distributed=False),
    "dp 2, float32": Kind(dtype=torch.float32),
    "dp 2, float32, replicated": Kind(dtype=torch.float32, distributed=False),
    "dp 2, fp16": Kind(dtype=torch.float16),
    "tp 2": Kind(tp=2),
    "pp 2": Kind(pp=2),
    "pp 2, tied": Kind(pp=2, tied=True),
    "pp 2, virtual": Kind(pp=2, virtual=2),
    "ep 2": Kind(ep=2, experts=True),
    "dp 4, two instances": Kind(size=4, instances=2),
    "pp 2, experts": Kind(pp=2, experts=True),
    "tp 2, dp 2": Kind(size=4, tp=2),
    "pp 2, dp 2": Kind(size=4, pp=2, tied=True),
    "one": Kind(size=1),
    "one, tied": Kind(size=1, tied=True),
    "one, experts": Kind(size=1, experts=True),
}
# What the tests run, and the page lists: layouts, those that a state is loaded in, and kills.
FOLLOWED = [kind for kind in KINDS if not kind.startswith("one") and "fp16" not in kind]
SAVED = {
    "dp 2": ["tp 2", "pp 2", "dp 2, replicated", "one"],
    "tp 2": ["dp 2", "tp 2, dp 2"],
    "pp 2, dp 2": ["one, tied", "pp 2, tied"],
    "ep 2": ["one, experts"],
    "pp 2, experts": ["ep 2"],
}
KILLED = ["dp 2"]


@dataclass
class Run:
    """Megatron's objects of a run.

    Args:
        kind: The layout.
        config: Of the model.
        chunks: Of the model on this rank.
        optimizer: Of Megatron.
        models: The chunks without wrappers.
    """

    kind: Kind
    config: Any
    chunks: list[Any]
    optimizer: Any
    models: list[nn.Module]


def run_of(name: str, **more: Any) -> Run:
    import megatron_shim  # noqa: F401
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    kind = KINDS[name]
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        kind.tp,
        kind.pp,
        kind.virtual if kind.virtual > 1 else None,
        expert_model_parallel_size=kind.ep,
        num_distributed_optimizer_instances=kind.instances,
    )
    halves = {"bf16": kind.dtype == torch.bfloat16, "fp16": kind.dtype == torch.float16, "params_dtype": kind.dtype}
    experts = {
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_token_dispatcher_type": "allgather",
        "moe_router_enable_expert_bias": True,  # a buffer
        "moe_router_score_function": "sigmoid",
    }
    config = TransformerConfig(
        num_layers=4 if kind.virtual > 1 else 2,
        hidden_size=12,
        ffn_hidden_size=20,
        num_attention_heads=4,
        num_query_groups=2,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=kind.tp,
        pipeline_model_parallel_size=kind.pp,
        virtual_pipeline_model_parallel_size=kind.virtual if kind.virtual > 1 else None,
        expert_model_parallel_size=kind.ep,
        pipeline_dtype=kind.dtype,
        **halves,
        **(experts if kind.experts else {}),
    )
    layout = DistributedDataParallelConfig(
        use_distributed_optimizer=kind.distributed,
        overlap_grad_reduce=kind.overlap,
        overlap_param_gather=kind.overlap,
        grad_reduce_in_fp32=True,
        num_distributed_optimizer_instances=kind.instances,
        bucket_size=500 if kind.overlap else None,
    )
    chunks, models = [], []
    for number in range(kind.virtual):
        torch.manual_seed(number)
        virtual = {"vp_stage": number} if kind.virtual > 1 else {}
        model = GPTModel(
            config=config,
            transformer_layer_spec=get_gpt_layer_local_spec(
                num_experts=4 if kind.experts else None, moe_grouped_gemm=False, normalization="RMSNorm"
            ),
            vocab_size=VOCABULARY,
            max_sequence_length=LENGTH,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=number),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=number),
            share_embeddings_and_output_weights=kind.tied,
            **virtual,
        )
        models.append(model)
        wrapped = model if kind.dtype == torch.float32 else Float16Module(config, model)
        chunks.append(DistributedDataParallel(config, layout, wrapped, disable_bucketing=number > 0))
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=0.02,
            clip_grad=1.0,
            initial_loss_scale=2.0**4,
            use_distributed_optimizer=kind.distributed,
            overlap_param_gather=kind.overlap,
            **halves,
            **more,
        ),
        chunks,
    )
    for chunk in chunks:
        chunk.broadcast_params()
    optimizer.reload_model_params()
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    return Run(kind, config, chunks, optimizer, models)


def attach(run: Run) -> Any:
    from polyak import EMA, Offload
    from polyak.hosts.megatron import attach as attach_megatron

    model = run.chunks if len(run.chunks) > 1 else run.chunks[0]
    return attach_megatron(EMA(HALF_LIFE, offload=Offload() if run.kind.offload else None), model, run.optimizer)


def batches(step: int, *, same: bool = False) -> Iterator[Tensor]:
    """Return the micro-batches of a data-parallel rank, or those that all of them have."""
    from megatron.core import parallel_state

    rank = 0 if same else parallel_state.get_data_parallel_rank()
    for micro in range(2):
        seed = 1000 * rank + 10 * step + micro
        yield torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def passes(run: Run, step: int, *, forward_only: bool = False, scale: float = 1.0) -> list[Any]:
    """Run the schedule of Megatron over the micro-batches of a step; return the losses on the last stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward_step(data: Iterator[Tensor], model: Any) -> Any:
        tokens = next(data)
        positions = torch.arange(LENGTH).expand_as(tokens)
        output = model(tokens, positions, None, labels=tokens.roll(-1, 1))

        def loss_of(output: Tensor) -> Any:
            loss = output.float().mean() * scale
            return loss, {"loss": loss.detach().clone()}

        return output, loss_of

    data = [batches(step, same=forward_only) for _ in run.chunks]
    found = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=data if len(data) > 1 else data[0],
        model=run.chunks,
        num_microbatches=2,
        seq_length=LENGTH,
        micro_batch_size=2,
        forward_only=forward_only,
    )
    return [one["loss"] for one in found]


def train(run: Run, steps: range, scale: float = 1.0) -> list[bool]:
    """Train as Megatron's ``train_step`` does; return which steps were made."""
    made = []
    for step in steps:
        for chunk in run.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        run.optimizer.zero_grad()
        passes(run, step, scale=scale)
        made.append(bool(run.optimizer.step()[0]))
    return made


@torch.no_grad()
def evaluated(run: Run) -> list[Any]:
    for chunk in run.chunks:
        chunk.eval()
    return passes(run, 99, forward_only=True)


def parts(run: Run) -> list[Any]:
    return [part for part in getattr(run.optimizer, "chained_optimizers", [run.optimizer]) if part.get_parameters()]


def master(run: Run) -> dict[str, Tensor]:
    """Return this rank's masters by the chunk, its name and the first element, as Megatron's optimizers have them."""
    names = {id(p): f"{i}.{name}" for i, model in enumerate(run.models) for name, p in model.named_parameters()}
    found = {}
    for part in parts(run):
        if run.kind.distributed:
            for own, shards in (
                (part.model_float16_groups, part.shard_fp32_from_float16_groups),
                (part.model_fp32_groups, part.shard_fp32_groups),
            ):
                for parameter, shard in zip(chain(*own), chain(*shards), strict=True):
                    place = part._get_model_param_range_map(parameter)["param"]
                    assert place.size == shard.numel()
                    found[f"{names[id(parameter)]} {place.start}"] = shard.detach().clone()
        elif run.kind.dtype == torch.float32:
            found |= {names[id(parameter)]: parameter.detach().clone() for parameter in part.get_parameters()}
        else:
            pairs = zip(chain(*part.float16_groups), chain(*part.fp32_from_float16_groups), strict=True)
            found |= {names[id(parameter)]: shard.detach().clone() for parameter, shard in pairs}
    return found


def weights(run: Run) -> dict[str, Tensor]:
    """Return this rank's weights by the chunk and name."""
    return {f"{i}.{n}": p.detach().clone() for i, m in enumerate(run.models) for n, p in m.named_parameters()}


def error(averages: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    assert averages.keys() == reference.keys(), averages.keys() ^ reference.keys()
    return max(((averages[n].double() - r).norm() / (r.norm() + 1e-30)).item() for n, r in reference.items())


def reference_of(run: Run, reference: dict[str, Tensor] | None) -> dict[str, Tensor]:
    now = {name: tensor.double() for name, tensor in master(run).items()}
    if reference is None:
        return now
    return {name: DECAY * reference[name] + (1 - DECAY) * tensor for name, tensor in now.items()}


def follows_masters(run: Run) -> bool:
    """Return whether the weights that this rank has masters of are those masters."""
    held = weights(run)
    for key, tensor in master(run).items():
        name, _, start = key.partition(" ")
        own = held[name].view(-1)[int(start or 0) :][: tensor.numel()]
        if not torch.equal(own, tensor.view(-1).to(own.dtype)):
            return False
    return True


def replicas_agree(run: Run) -> bool:
    """Return whether the data-parallel ranks have the same weights."""
    from megatron.core import parallel_state

    group = parallel_state.get_expert_data_parallel_group() if run.kind.ep > 1 else run.chunks[0].dp_cp_group
    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, weights(run), group)
    return all(torch.equal(found[0][name], tensor) for other in found for name, tensor in other.items())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def messages(act: Callable[[], object]) -> dict[str, int]:
    """Return how many messages of each kind are sent."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        act()
    words = ("c10d", "gloo", "gather", "reduce", "broadcast", "send", "recv", "barrier", "record_param_comms")
    names = (event.name() for event in profiled.profiler.kineto_results.events())  # key_averages() takes seconds
    return Counter(name for name in names if any(word in name for word in words))


# Jobs


def follows(name: str) -> dict[str, Any]:
    """Train; compare the average, a swap and later training to references."""
    plain = run_of(name)
    train(plain, range(8))
    expected_messages = messages(lambda: train(plain, range(8, 9)))
    expected, expected_weights = master(plain), weights(plain)
    run = run_of(name)
    ema, reference = attach(run), None
    for step in range(5):
        train(run, range(step, step + 1))
        reference = reference_of(run, reference)
    found_messages = messages(lambda: train(run, range(5, 6)))
    reference = reference_of(run, reference)
    shadow, updates = ema.average._average.shadow, ema.num_updates
    before, raw = evaluated(run), master(run)
    for chunk in run.chunks if run.kind.overlap else []:
        chunk.start_param_sync()  # weights are on their way
    with ema.applied():
        swapped, output = master(run), evaluated(run)
        published, agreed = follows_masters(run), replicas_agree(run)
    again, restored = evaluated(run), master(run)
    distance = ema.metrics()["ema/distance"]
    with suppress(ZeroDivisionError), ema.applied():
        1 / 0  # noqa: B018
    after_an_error = master(run)
    train(run, range(6, 9))
    return {
        "messages": (found_messages, expected_messages),
        "error": error(swapped, reference),
        "moved": error(raw, reference),
        "published": published,
        "agreed": agreed,
        "outputs moved": [not torch.equal(a, b) for a, b in zip(before, output, strict=True)],
        "outputs restored": all(torch.equal(a, b) for a, b in zip(before, again, strict=True)),
        "restored": same(restored, raw) and same(after_an_error, raw),
        "harmless": same(expected, master(run)) and same(expected_weights, weights(run)),
        "distance": distance,
        "squares": {
            n: ((raw[n].double() - r).square().sum().item(), r.square().sum().item()) for n, r in reference.items()
        },
        "updates": updates,
        "elements": sum(a.numel() for a in shadow.averages.values()),
    }


def counts(name: str) -> dict[str, Any]:
    """Let steps overflow, where the loss is scaled."""
    run = run_of(name)
    ema = attach(run)
    found: dict[str, Any] = {"made": train(run, range(2)), "after 2": (ema.num_updates, ema.timestamp.batch.value)}
    found["overflowed"] = train(run, range(2, 4), scale=1e38)
    found["after an overflow"] = (ema.num_updates, ema.timestamp.batch.value)
    found["made later"] = train(run, range(4, 5))
    found["after 3"] = ema.num_updates
    ema.detach()
    train(run, range(5, 6))
    found["after detach"] = ema.num_updates
    found["methods"] = [one for one in ("step", "zero_grad", "state_dict") if one in vars(run.optimizer)]
    found["hooks"] = [len(model._forward_hooks) for model in run.models]
    return found


def refuses(name: str, folder: str) -> dict[str, str]:
    """Return the errors of what must not run while the average is swapped in, and of what no rank can do."""
    import copy

    from polyak import EMA, Recorder
    from polyak import attach as attach_plain
    from polyak.hosts.megatron import attach as attach_megatron

    run = run_of(name)
    ema = attach(run)
    train(run, range(2))
    found = {}

    def attempt(what: str, act: Any) -> None:
        try:
            act()
            found[what] = "nothing"
        except Exception as error:
            found[what] = f"{type(error).__name__}: {error}"

    def loss() -> Tensor:
        tokens = next(batches(0))
        return run.chunks[0](tokens, torch.arange(LENGTH).expand_as(tokens), None, labels=tokens).float().mean()

    for chunk in run.chunks:
        chunk.zero_grad_buffer()
    earlier, before = loss(), master(run)
    with ema.applied():
        attempt("backward", loss().backward)
        attempt("backward of before", earlier.backward)
        attempt("zero_grad", run.optimizer.zero_grad)
        attempt("step", run.optimizer.step)
        attempt("save", run.optimizer.state_dict)
        attempt("state", ema.state_dict)
        attempt("sharded state", ema.sharded_state_dict)
        attempt("load", lambda: ema.load_state_dict({}))
        attempt("second", lambda: ema.applied().__enter__())
    calls = list[str]()

    def fails(name: str, tensor: Tensor) -> None:
        del tensor
        calls.append(name)
        raise OSError("the engine is gone")

    attempt("publish", lambda: ema.publish(fails))
    found["calls"] = str(len(calls))
    found["lost"] = str(not same(before, master(run)))
    found["gradients"] = str(
        [buffer for chunk in run.chunks for buffer in chunk.buffers if bool(buffer.grad_data.any())]
    )
    attempt("model", lambda: ema.model)
    attempt("copy", lambda: copy.deepcopy(ema))
    attempt("by hand", ema.step)
    attempt("recorder", lambda: attach_megatron(Recorder(folder, "1ba"), run.chunks, run.optimizer))
    attempt("unwrapped", lambda: attach_megatron(EMA("2ba"), run.models[0], run.optimizer))
    attempt("torch's", lambda: attach_megatron(EMA("2ba"), run.chunks, torch.optim.SGD([torch.ones(1)])))
    attempt("plain", lambda: attach_plain(EMA("2ba"), run.models[0], run.optimizer))
    inner = parts(run)[0].optimizer
    attempt("plain, inner", lambda: attach_plain(EMA("2ba"), run.models[0], inner))
    config = parts(run)[0].config
    config.optimizer_cpu_offload = dist.get_rank() == 0
    attempt("on one rank", lambda: attach_megatron(EMA("2ba"), run.chunks, run.optimizer))
    config.optimizer_cpu_offload = False
    offloaded = run_of(name, optimizer_cpu_offload=True, optimizer_offload_fraction=1.0)
    attempt("offload", lambda: attach(offloaded))
    run.models[0].register_parameter("extra", nn.Parameter(torch.ones(1)))
    attempt("without a master", lambda: attach_megatron(EMA("2ba"), run.chunks, run.optimizer))
    return found


def saves(name: str, folder: str) -> dict[str, Any]:
    """Save after 4 steps by Megatron, by DCP and as safetensors; return the averages that one then has after 7."""
    from megatron.core import dist_checkpointing

    run = run_of(name)
    ema = attach(run)
    train(run, range(4))
    state = ema.state_dict()
    written = sum(one.numel() for one in tree_leaves(state) if getattr(one, "written", False))
    dcp.save({"ema": state}, checkpoint_id=f"{folder}/dcp")
    if dist.get_rank() == 0:
        Path(folder, "megatron").mkdir()
    dist.barrier()
    dist_checkpointing.save({"polyak": ema.sharded_state_dict()}, f"{folder}/megatron")
    ema.save(f"{folder}/averaged.safetensors")
    ema.save(f"{folder}/averaged32.safetensors", dtype=torch.float32)
    raw = evaluated(run)
    buffers = {name: buffer.clone() for name, buffer in run.models[0].named_buffers() if name.endswith("bias")}
    published = dict[str, Tensor]()
    ema.publish(lambda name, tensor: published.update({name: tensor.clone()}), every_rank=True)
    with ema.applied():
        found = {"raw": raw, "averaged": evaluated(run), "buffers": buffers, "written": written, "published": published}
    saves_later(run, ema, f"{folder}/later")
    return found


def saves_later(run: Run, ema: Any, to: str) -> None:
    """Let an asynchronous save write as late as it can: after the average has moved on."""
    from megatron.core import dist_checkpointing

    if dist.get_rank() == 0:
        Path(to).mkdir()
    dist.barrier()
    request = dist_checkpointing.save({"polyak": ema.sharded_state_dict()}, to, async_sharded_save=True)
    train(run, range(4, 5))
    request.execute_sync()


def loads(name: str, folder: str, way: str, to: str) -> int:
    """Load the state in another layout, and save the averages."""
    from megatron.core import dist_checkpointing

    run = run_of(name)
    ema = attach(run)
    if way in {"megatron", "later"}:
        state = dist_checkpointing.load({"polyak": ema.sharded_state_dict()}, f"{folder}/{way}")["polyak"]
    else:
        state = {"ema": ema.state_dict()}
        dcp.load(state, checkpoint_id=f"{folder}/dcp")
        state = state["ema"]
    ema.load_state_dict(state)
    ema.save(to, dtype=torch.float32)
    return ema.num_updates


def alone(name: str, file: str) -> list[Any]:
    """Return the losses of a model on one rank with exported weights."""
    from safetensors.torch import load_file

    run = run_of(name)
    run.models[0].load_state_dict(load_file(file), strict=False)
    return evaluated(run)


def is_small(folder: str) -> dict[str, Any]:
    """Train a plain module of which one rank has only padding."""
    import megatron_shim  # noqa: F401
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel()
    torch.manual_seed(0)
    halves: Any = {"bf16": True, "params_dtype": torch.bfloat16}
    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=2, **halves)
    model = nn.Linear(4, 2, bias=False).bfloat16()
    chunk = DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=True), model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=0.02, use_distributed_optimizer=True, **halves), [chunk]
    )
    run = Run(Kind(), config, [chunk], optimizer, [model])
    ema, reference = attach(run), None
    for step in range(4):
        chunk.zero_grad_buffer()
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(step)).bfloat16()
        chunk(x).float().square().mean().backward()
        chunk.finish_grad_sync()
        optimizer.step()
        reference = reference_of(run, reference)
    with ema.applied():
        found = {"error": error(master(run), reference) if reference else 0.0, "weights": weights(run)}
    dcp.save({"ema": ema.state_dict()}, checkpoint_id=f"{folder}/dcp")
    ema.save(f"{folder}/averaged")
    state = {"ema": ema.state_dict()}
    dcp.load(state, checkpoint_id=f"{folder}/dcp")
    ema.load_state_dict(state["ema"])
    return {**found, "updates": ema.num_updates, "parts": len(reference or ())}


def checkpoint(run: Run, ema: Any, *, loading: bool) -> dict[str, Any]:
    """Return the state of everything for ``dist_checkpointing``."""
    metadata = {"distrib_optim_sharding_type": "dp_reshardable"}
    model = {f"model{i}": one.sharded_state_dict() for i, one in enumerate(run.models)}
    optimizer = run.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    return {**model, "optimizer": optimizer, "polyak": ema.sharded_state_dict()}


def is_killed(name: str, folder: str, at: int) -> None:
    """Save by Megatron after each step, and die before the step ``at``."""
    from megatron.core import dist_checkpointing

    run = run_of(name)
    ema = attach(run)
    done = sorted(Path(folder).glob("step*/metadata.json"))
    begin = 0
    if done:
        begin = int(done[-1].parent.name.removeprefix("step"))
        for part in parts(run):
            part._init_optimizer_states_with_dummy_values()  # of torch's Adam, which Megatron loads into
        state = dist_checkpointing.load(checkpoint(run, ema, loading=True), str(done[-1].parent))
        for i, model in enumerate(run.models):
            model.load_state_dict(state[f"model{i}"])
        run.optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["polyak"])
        for one in (one for part in parts(run) for one in part.optimizer.state.values()):
            one["step"] = torch.tensor(float(begin))  # of torch's Adam, which Megatron gives one tensor for all
    for step in range(begin, 6):
        if step == at:
            dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
        train(run, range(step, step + 1))
        to = Path(folder, f"step{step + 1}")
        if dist.get_rank() == 0:
            to.mkdir()
        dist.barrier()
        dist_checkpointing.save(checkpoint(run, ema, loading=False), str(to))
    raw = master(run)
    with ema.applied():
        average = master(run)
    torch.save({"raw": raw, "average": average}, Path(folder, f"end {dist.get_rank()}.pt"))
