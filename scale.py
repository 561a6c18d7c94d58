"""
Scale: the same maths on several GPUs and in little memory.

The idea files (embed.py and rl.py) state a loss on a batch. This file computes its gradient when
neither the batch nor the model fits. It knows processes, chunks, shards, adapters and checkpoints,
and nothing of prompts, rationales or rewards.

    gather      rows of all processes side by side: each has the joined batch's negatives
    backward    GradCache: the gradient of a loss over the joined batch, in the memory of one chunk
    LoRALinear  trains a small update of W instead of W: a fraction of the optimizer's memory
    shard       FSDP2: a process holds its part of a layer, and all of it only while it runs
    Optimizer   Muon for the layers' matrices, AdamW for the rest; warm-up, flat, linear cool-down
    save_state  what is trained, inside a stage; a kill at any moment leaves a good file

How to run: torchrun --nproc_per_node=8 train.py --preset qwen3vl-2b ...
The contract of several processes: each holds its share of the batch's rows; all compute the same
loss on the joined vectors; each leaves the part of the gradient that comes from its rows; the parts
are added up, not averaged. One process has nothing to gather, and leaves the plain gradient.

Sources: GradCache, arXiv 2101.06983; LoRA, arXiv 2106.09685; FSDP, arXiv 2304.11277; Muon, Keller
Jordan 2024 (kellerjordan.github.io/posts/muon) and, for the size of its updates, arXiv 2502.16982.
Left out: tensor and pipeline parallelism, CPU offload, quantised weights.
"""

import collections
import datetime
import math
import os
import shutil

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------------
# Processes: what those of one torchrun tell each other


def world_size():
    """How many processes train together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """The number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main():
    """True on the process that writes files and speaks."""
    return rank() == 0


def gather_objects(values):
    """A list on every process -> one list, joined in process order. Any picklable values."""
    if world_size() == 1:
        return list(values)
    lists = [None] * world_size()
    dist.all_gather_object(lists, list(values))
    return [value for part in lists for value in part]


def barrier():
    """Nobody goes on before all are here."""
    gather_objects([])


def gather(x):
    """x (n, ...), n may differ between processes -> the rows of all processes (N, ...) in process
    order, and a LongTensor (n,) of the places where this process' rows are. Carries no gradient."""
    if world_size() == 1:
        return x.detach(), torch.arange(len(x), device=x.device)
    parts = gather_objects([x.detach().cpu()])
    start = sum(len(part) for part in parts[: rank()])
    rows = torch.arange(start, start + len(x), device=x.device)
    return torch.cat(parts).to(x.device), rows


# ---------------------------------------------------------------------------------------------
# GradCache


def chunks_of(lengths, budget):
    """Cut rows into chunks that one forward pass can take.

    lengths: tokens of each row. A chunk is padded to its longest row, so rows go by length, longest
    first. A new chunk begins where the padded tokens would exceed the budget, or where the longest
    row is more than 1.25 times the shortest. A row above the budget is alone.
    -> lists of row numbers. chunks_of([5, 9, 5], budget=10) -> [[1], [0, 2]]
    """
    chunks = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        longest = lengths[chunks[-1][0]] if chunks else 0
        fits = chunks and (len(chunks[-1]) + 1) * longest <= budget
        if fits and lengths[row] * 1.25 >= longest:
            chunks[-1].append(row)
        else:
            chunks.append([row])
    return chunks


def backward(lengths, forward, loss, budget):
    """GradCache (arXiv 2101.06983): the gradient of a loss over ALL vectors, in little memory.

    A contrastive loss L couples all vectors v_i of a batch, so it cannot be cut into chunks. But
        dL/dθ = Σ_i dL/dv_i · dv_i/dθ                   by the chain rule;
        g_i = dL/dv_i                                   needs the vectors alone, no activations;
        dL/dθ = d/dθ Σ_i g_i · v_i(θ), g_i constant     is a sum over rows: any chunks will do.
    So: vectors once without gradients, g from the loss, then chunk by chunk with gradients.
    It costs a second forward pass and saves all activations but those of a chunk.

    lengths  {name: [padded tokens of each row]} of this process; at least one row of each name
    forward  (name, rows, with_loss) -> vectors (len(rows), k, H), a further loss of these rows
             (a scalar tensor, or None) and {metric: float}; called twice it gives the same. A row
             has k vectors: a target one, a query perhaps two (direct, reasoned)
    loss     {name: (n, k, H)} of all processes, in process order, then row order -> scalar
    budget   padded tokens of a pass. Where the sum of every process' lengths fits in one, the first
             pass keeps its activations, and there is no second
    -> loss (a float: with the further losses of all rows) and metrics, summed over rows and
    processes. Leaves this process' part of the gradient: Optimizer.step adds the parts up.
    """
    # 1) Passes. Sharded layers meet in each, so all processes make equally many: those with fewer
    # chunks repeat their last with weight zero.
    passes = [(name, rows) for name in lengths for rows in chunks_of(lengths[name], budget)]
    count = len(passes)
    passes += passes[-1:] * (max(gather_objects([count])) - count)
    num_tokens = sum(map(sum, lengths.values()))
    one_pass = max(gather_objects([num_tokens])) <= budget

    # 2) Vectors v_i
    with torch.set_grad_enabled(one_pass):
        results = [forward(name, rows, with_loss=one_pass) for name, rows in passes]
    vectors = {}
    for (name, rows), (v, _, _) in zip(passes, results):
        if name not in vectors:
            vectors[name] = v.new_zeros(len(lengths[name]), *v.shape[1:])
        vectors[name][rows] = v.detach()

    # 3) g_i = dL/dv_i, of which this process takes its own rows
    joined, places = {}, {}
    for name in lengths:
        joined[name], places[name] = gather(vectors[name])
        joined[name].requires_grad_()
    value = loss(joined)
    value.backward()
    g = {name: joined[name].grad[places[name]] for name in lengths}

    # 4) The gradient of Σ g_i · v_i and of the further losses, chunk by chunk
    metrics = []
    for i, (name, rows) in enumerate(passes):
        v, further, numbers = results[i] if one_pass else forward(name, rows, with_loss=True)
        results[i] = None  # its activations are not needed again
        surrogate = (v * g[name][rows]).sum()
        if further is not None:
            surrogate = surrogate + further
            numbers["further"] = float(further.detach())
        (surrogate * (i < count)).backward()
        metrics.append(numbers)

    total = collections.Counter()
    for numbers in gather_objects(metrics[:count]):
        total.update(numbers)
    further = total.pop("further", 0.0)
    return float(value.detach()) + further, dict(total)


# ---------------------------------------------------------------------------------------------
# Large models in training: LoRA, shards, and the way back to an ordinary model


class LoRALinear(nn.Module):
    """y = W x + b + (alpha / rank) B A x, with W and b frozen. A (rank, in), B (out, rank).

    W keeps its name: the base model's weights are called the same with and without."""

    def __init__(self, linear, rank):
        super().__init__()
        out_features, in_features = linear.weight.shape
        device = linear.weight.device
        self.weight = linear.weight
        self.bias = linear.bias
        self.scale = 64.0 / rank  # alpha = 64: an update counts twice at rank 32
        # fp32 whatever W is: steps of 1e-5 are lost in bf16. B = 0: training starts at W. A starts
        # as a Linear's weight does.
        self.lora_a = nn.Linear(in_features, rank, bias=False, device=device).weight
        self.lora_b = nn.Parameter(torch.zeros(out_features, rank, device=device))

    def forward(self, x):
        update = F.linear(F.linear(x, self.lora_a), self.lora_b)
        return F.linear(x, self.weight, self.bias) + self.scale * update


def add_lora(model, rank):
    """Freeze the model and give each linear layer of both towers' blocks an update, in place."""
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        in_block = ".layers." in name or ".blocks." in name
        if in_block and isinstance(layer, nn.Linear):
            model.set_submodule(name, LoRALinear(layer, rank))


def trainable(model):
    """{name: weight} of what is trained."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def prepare(model, dtype, lora=0, checkpointing=False, compile=False, train_vision=True):
    """Make a model ready to be trained, in place: what is trained becomes fp32, what is frozen
    stays as it is, and the arithmetic is in `dtype`. lora: the rank; 0 trains every weight."""
    if lora:
        add_lora(model, lora)
    if not train_vision:
        model.visual.requires_grad_(False)
    for p in trainable(model).values():
        p.data = p.data.float()
    model.set_checkpointing(checkpointing)
    if compile:
        model.compile_layers()
    if dtype != torch.float32:
        # Each call is an autocast of its own: autocast keeps the weights it has cast, and those
        # of a pass without gradients must not serve the pass with gradients.
        cast = torch.autocast(model.device.type, dtype)
        model.forward = cast(model.forward)
        model.logits = cast(model.logits)
    return model


def shard(model, dtype):
    """FSDP2: each process holds a part of every text layer in fp32, and gathers a layer in `dtype`
    while it runs. The vision tower stays in one piece: not every process has images in a pass, and
    nobody must wait for one that stays away. So do embedding and head, used outside the layers."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # takes 1.2 s to import

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    embedding = model.text.embed_tokens.weight
    for module in (*model.text.layers, model.text):
        fully_shard(module, mp_policy=policy, ignored_params={embedding})
        # A sum, not a mean: each process has the gradient of its rows alone.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return model


def is_sharded(tensor):
    """FSDP2's tensors are DTensors, on which full_tensor() gathers all parts on every process."""
    return hasattr(tensor, "full_tensor")


def complete(tensor):
    """A tensor in one piece. Of one in shards all processes ask together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


@torch.no_grad()
def merge(model, dtype=torch.float32, into=None):
    """What is being trained as an ordinary model of `dtype`: shards gathered, LoRA added in fp32
    and rounded once. `model` stays as it is. into: the result of an earlier call, written over.
    Where there are shards, all processes call it together."""
    trained = dict(model.named_parameters())
    if into is None:
        with torch.device("meta"):
            into = type(model)(model.c)
        into.to(dtype).to_empty(device=model.device).requires_grad_(False)
        if "lm_head.weight" not in trained:  # it is tied: a tensor is named once
            into.lm_head.weight = into.text.embed_tokens.weight
    for name, p in into.named_parameters():
        weight = complete(trained[name])
        parent, _, kind = name.rpartition(".")
        layer = model.get_submodule(parent)
        if isinstance(layer, LoRALinear) and kind == "weight":
            weight = weight.float() + layer.scale * (layer.lora_b @ layer.lora_a)
        p.copy_(weight)
    return into.eval()


# ---------------------------------------------------------------------------------------------
# Optimizer


def add_gradients(params):
    """Add each gradient up over the processes; shards were added up by their backward pass.
    A gradient that no process has stays None: AdamW's moments then rest, as in one process."""
    if world_size() == 1:
        return
    params = [p for p in params if not is_sharded(p)]
    has_gradient = [i for i, p in enumerate(params) if p.grad is not None]
    for i in sorted(set(gather_objects(has_gradient))):
        p = params[i]
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        dist.all_reduce(p.grad)


def clip_gradients(params, limit):
    """Scale all gradients so that their joint norm is at most `limit` -> the norm before."""
    grads = [p.grad for p in params if p.grad is not None]
    norms = [complete(grad.norm()) for grad in grads]
    norm = float(torch.stack(norms).norm())
    factor = min(1.0, limit / (norm + 1e-6))
    for grad in grads:
        grad.mul_(factor)
    return norm


def orthogonalise(update):
    """Newton-Schulz: update (rows, columns) = U S V' -> nearly U V'.

    A step maps each singular value s to a s + b s³ + c s⁵, which drives what lies in (0, 1] towards
    1. Muon's coefficients rise steeply from 0 and settle between 0.68 and 1.13 instead of at 1.
    In fp32: torch.optim.Muon's bfloat16 is slow on a CPU without instructions for it.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = update / update.norm().clamp(min=1e-7)  # no singular value is above the norm, now 1
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T  # for the smaller Gram matrix
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum made orthogonal: a step equally long in every direction of a matrix.

    Times 0.2 sqrt(max(rows, columns)) its entries are as large as those of AdamW's steps, so the
    learning rate is the same (arXiv 2502.16982). A convolution's kernel is a matrix (out, rest).
    """

    MOMENTUM = 0.95

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - self.MOMENTUM)
                update = p.grad.lerp(average, self.MOMENTUM).flatten(1)
                size = 0.2 * math.sqrt(max(update.shape))
                p.add_(orthogonalise(update).view_as(p), alpha=-group["lr"] * size)


def schedule(i, steps, warmup, cool):
    """The learning rate of update i (from 0) as a share of its peak: it rises over `warmup`
    updates, stays, and falls linearly over the last `cool`, to 2 % at least."""
    rise = min(1.0, (i + 1) / max(1, warmup))
    fall = min(1.0, (steps - i) / max(1, cool))
    return rise * max(0.02, fall)


class Optimizer:
    """Muon for the matrices of the layers and AdamW for the rest, or AdamW alone.

    cfg: .optimizer, .lr, .warmup in steps. steps: of the schedule; may grow while the rate is flat.
    factor: times lr. cool: the share of the steps in which the rate falls. patches: Muon for the
    patch embedding too. From nothing, images are then read sooner; later it only disturbs.

    Muon learns to look things up in the pocket world sooner than AdamW. Embedding and head stay
    with AdamW: a row of theirs is a token, and most tokens are not in a batch.
    """

    def __init__(self, model, cfg, steps, factor=1.0, cool=0.4, patches=False):
        self.steps = steps
        self.warmup = min(cfg.warmup, steps // 4)
        self.cool_steps = cool * steps
        self.peak = cfg.lr * factor
        trained = trainable(model)
        self.params = list(trained.values())
        matrices = {}
        if cfg.optimizer == "muon":
            matrices = {n: p for n, p in trained.items() if is_matrix(n, p, patches)}
        rest = [p for name, p in trained.items() if name not in matrices]
        self.parts = []
        if rest:
            # foreach would take no mixture of shards and complete tensors.
            how = {"betas": (0.9, 0.98), "weight_decay": 0.0, "foreach": False}
            self.parts.append(torch.optim.AdamW(rest, self.peak, **how))
        if matrices:
            self.parts.append(Muon(matrices.values(), self.peak))

    def step(self, i):
        """Update number i (from 0) -> norm of the gradient before clipping."""
        add_gradients(self.params)
        norm = clip_gradients(self.params, limit=1.0)
        rate = self.peak * schedule(i, self.steps, self.warmup, self.cool_steps)
        for part in self.parts:
            part.param_groups[0]["lr"] = rate
            part.step()
            part.zero_grad()
        return norm

    def state_dict(self):
        return {"steps": self.steps, "parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, saved):
        self.steps = saved["steps"]
        for part, state in zip(self.parts, saved["parts"]):
            params = part.param_groups[0]["params"]
            for i, moments in state["state"].items():
                state["state"][i] = {key: like(x, params[i]) for key, x in moments.items()}
            part.load_state_dict(state)


def is_matrix(name, p, patches):
    """Is it Muon's? The two-dimensional weights of layers and mergers, and those of a new module,
    unless its name is excepted here."""
    if "patch_embed.proj.weight" in name:
        return patches
    return p.ndim == 2 and "embed" not in name and "lm_head" not in name


# ---------------------------------------------------------------------------------------------
# Checkpoints inside a stage


def like(x, p):
    """A copy of a file's tensor, in shards where the parameter p is in shards and x has its shape.
    The file itself stays mapped, and keeps its room on the disk, as long as x is in use."""
    if not is_sharded(p) or x.shape != p.shape:
        return x.clone()
    return dist.tensor.distribute_tensor(x.to(p.device), p.device_mesh, p.placements)


def for_file(value):
    """Nested containers with each sharded tensor gathered. All processes call it; a tensor at a
    time is complete on each, and the main process alone keeps them, in its CPU memory."""
    if isinstance(value, dict):
        return {key: for_file(x) for key, x in value.items()}
    if isinstance(value, list):
        return [for_file(x) for x in value]
    if not is_sharded(value):
        return value
    whole = complete(value)
    return whole.cpu() if is_main() else None


def need_space(folder, size, what):
    """OSError, in one line, unless the disk has room for `size` bytes more of `what`."""
    free = shutil.disk_usage(folder).free
    if free < size:
        room = f"{size / 1e9:.2f} GB do not fit, {free / 1e9:.2f} GB are free"
        raise OSError(f"{folder}: {what} of {room}")


def save_state(path, step, model, optimizer):
    """Write what is trained, the optimizer and its schedule. The order of the data and all random
    numbers follow from the step. Written aside and renamed, so that a kill at any moment leaves
    the state before as it is. All processes call it."""
    state = {"step": step, "model": trainable(model), "optimizer": optimizer.state_dict()}
    state = for_file(state)
    if is_main():
        try:
            with open(f"{path}.part", "wb") as f:
                torch.save(state, f)
        except RuntimeError as e:  # what torch makes of a full disk
            raise OSError(f"{path}: not written ({e.__context__ or e})") from None
        os.replace(f"{path}.part", path)


@torch.no_grad()
def load_state(path, model, optimizer):
    """Put a state into model and optimizer -> its step; 0 where there is none. (train.py refuses a
    state of other options.)"""
    if not os.path.exists(path):
        return 0
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    for name, p in trainable(model).items():
        p.copy_(like(saved["model"][name], p))
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"]


# ---------------------------------------------------------------------------------------------
# The machine


def find_device(name):
    """--device -> a device that exists; empty: CUDA where there is a GPU. ValueError otherwise."""
    if not name:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"device {name}: {str(e).splitlines()[0][:120]}") from None
    return name


def join_processes(name=""):
    """Under torchrun, meet the other processes -> the device of this one; alone, find_device."""
    device = find_device(name)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    backend = "gloo"
    if device.startswith("cuda"):
        device = find_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    # They wait for each other as long as a stage may take on one of them.
    dist.init_process_group(backend, timeout=datetime.timedelta(days=30))
    return device
