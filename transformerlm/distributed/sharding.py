"""One model that several ranks train: cut among them by PyTorch's FSDP2, from outside.

The ranks form a mesh, `replicate x shard`. The `shard_size` ranks of a group hold one copy of the model: each has some
rows of every tensor, and of its gradient and optimizer state. Groups are replicas, which average their gradients. So
`shard_size` 1 is data parallelism, all ranks in one group is FSDP, and what is between is HSDP (Zhao et al. 2023,
"PyTorch FSDP"). A block's whole weights exist only while it computes.

The model, the loss and the optimizers know nothing of this: `Shards.parameters` are plain tensors of the rows that are
here, for the optimizer. In a world of one they are the model's own parameters, and every call returns at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from transformerlm.distributed.rows import Rows, own_rows
from transformerlm.distributed.world import World, all_reduce_sum, set_timeout

if TYPE_CHECKING:  # importing FSDP2 takes longer than a short run on one process
    from torch.distributed.fsdp import FSDPModule


@dataclass(frozen=True)
class Shards:
    """A model, and the rows of it that this rank holds.

    Args:
        model: the model; `shard_model` has changed it in place.
        parameters: the rows of each parameter that are here, by name, as what an optimizer updates.
        rows: the same rows, and where they are in the whole.
        world: the ranks that train the model.
        shard_size: how many of them share one copy of it.
        group: those that share this copy; None in a world of one.
    """

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    rows: dict[str, Rows]
    world: World = field(default_factory=World)
    shard_size: int = 1
    group: dist.ProcessGroup | None = None
    _whole: dict[str, nn.Parameter] = field(default_factory=dict, repr=False)

    @classmethod
    def whole(cls, model: nn.Module) -> Shards:
        """Return a model that one process trains."""
        parameters = dict(model.named_parameters())
        return cls(model, parameters, {name: Rows.whole(one.data) for name, one in parameters.items()})

    @property
    def place(self) -> int:
        """Return which of the `shard_size` places in its group this rank has."""
        return self.world.rank % self.shard_size

    @property
    def num_replicas(self) -> int:
        """Return how many copies of the model there are."""
        return self.world.world_size // self.shard_size

    def groups(self, groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return an optimizer's groups of the model's parameters with the rows that are here in their place."""
        here = {id(whole): self.parameters[name] for name, whole in self._whole.items()}
        return [{**group, "params": [here.get(id(one), one) for one in group["params"]]} for group in groups]

    def rows_of(self, parameters: Iterable[Tensor]) -> list[Rows]:
        """Return where in the whole an optimizer's parameters are, which are some of `parameters`."""
        found = {id(one): self.rows[name] for name, one in self.parameters.items()}
        return [found[id(one)] for one in parameters]

    def begin_micro_batch(self, *, is_last: bool) -> None:
        """Let replicas average their gradients in the last micro-batch of a step only; groups always add up theirs."""
        if self._whole:
            cast("FSDPModule", self.model).set_requires_all_reduce(is_last)

    def take_gradients(self) -> None:
        """Give the rows that are here the gradients of the last backward pass; zeros where there are none."""
        for name, whole in self._whole.items():
            here, grad = self.parameters[name], whole.grad
            if here.requires_grad:
                here.grad = torch.zeros_like(here) if grad is None else grad.to_local()  # type: ignore[attr-defined]

    def drop_gradients(self) -> None:
        """Forget all gradients."""
        for parameters in (self._whole, self.parameters):
            for one in parameters.values():
                one.grad = None

    @contextmanager
    def same_outputs(self) -> Iterator[None]:
        """Give every rank rank 0's outputs of the model, so that what depends on them takes the same way everywhere."""

        def share(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            output = output.contiguous()
            dist.broadcast(output, src=0)
            return output

        handle = self.model.register_forward_hook(share)
        try:
            yield
        finally:
            handle.remove()

    def settle(self) -> None:
        """Drop whole weights that a forward pass without a backward pass has left; the rows may change now."""
        if self._whole:
            cast("FSDPModule", self.model).reshard()

    def sum_with_norm(self, sums: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums over the ranks of `sums` `(n,)`, and the norm of all rows from that of each rank's; one wait.

        The ranks of a group hold different rows, and replicas hold the same ones.
        """
        if not self.world.is_distributed:
            return sums, norm
        square = norm.to(sums).square() / self.num_replicas
        joint = all_reduce_sum(torch.cat((sums, square.view(1))), self.world)
        return joint[:-1], joint[-1].sqrt()

    def whole_norms(self, norms: Tensor) -> Tensor:
        """Return the L2 norms of whole tensors from the norms `(n,)` of the rows that each rank has of them."""
        if not self.world.is_distributed:
            return norms
        return (all_reduce_sum(norms.square(), self.world) / self.num_replicas).sqrt()

    def fill_from_rank_zero(self, source: nn.Module | None) -> None:
        """Copy the parameters of `source`, a whole model on the CPU of rank 0 and None elsewhere, one tensor at a time.

        So no other rank needs memory for more than one tensor besides its rows.
        """
        theirs = dict(source.named_parameters()) if source is not None else {}
        for name, rows in self.rows.items():
            value = theirs[name].detach() if name in theirs else torch.empty(rows.shape, dtype=rows.local.dtype)
            dist.broadcast(value, src=0)
            rows.local.copy_(value[rows.first : rows.first + len(rows.local)])


@dataclass(frozen=True)
class Unit:
    """Modules whose weights are gathered together when one of them computes, in bfloat16 or as they are."""

    modules: Sequence[nn.Module]
    in_bf16: bool = False


def shard_model(
    model: nn.Module, units: Sequence[Unit], *, world: World, shard_size: int, device: torch.device
) -> Shards:
    """Cut a model, built on the meta device, among the ranks; its parameters are then on `device`, without values.

    A unit inside another comes before it. What is in no unit is gathered from the first forward pass to the end of the
    backward pass. Units in bfloat16 are gathered so, and autocast keeps no second copy of their weights; their
    gradients are summed in fp32. Rows stay fp32.

    Raises:
        ValueError: `shard_size` does not divide the ranks.
    """
    if world.world_size % shard_size:
        raise ValueError(
            f"parallel.shard: expected a number that divides the {world.world_size} processes, found {shard_size}"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    _allow_views()
    sizes = (world.world_size // shard_size, shard_size)
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("replicate", "shard"))
    for name in ("replicate", "shard"):  # their default is torch's, whatever the whole group waits
        set_timeout(mesh.get_group(name), world)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for unit in units:
        fully_shard(list(unit.modules), mesh=mesh, mp_policy=policy if unit.in_bf16 else MixedPrecisionPolicy())
    model.register_forward_hook(_begin_backward)  # before those of FSDP2
    fully_shard(model, mesh=mesh)
    model.to_empty(device=device)
    whole = dict(model.named_parameters())
    with torch.no_grad():
        parameters = {name: nn.Parameter(one.to_local(), one.requires_grad) for name, one in whole.items()}  # type: ignore[attr-defined]
    place = world.rank % shard_size
    rows = {
        name: Rows(one.data, tuple(whole[name].shape), own_rows(len(whole[name]), place, shard_size).start)
        for name, one in parameters.items()
    }
    return Shards(model, parameters, rows, world, shard_size, mesh.get_group("shard"), whole)


def exchange(parts: Sequence[Tensor], sizes: Sequence[int], group: dist.ProcessGroup) -> list[Tensor]:
    """Send `parts[j]`, flat, to place j of the group, and return what each place sends here, `sizes[j]` numbers."""
    received = parts[0].new_empty(sum(sizes))
    dist.all_to_all_single(received, torch.cat(list(parts)), list(sizes), [len(part) for part in parts], group=group)
    return list(torch.split(received, list(sizes)))


def _begin_backward(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    """Let an output that no trained weight is below ask for a gradient: FSDP2 sums gradients once one has come to it.

    So the head alone can be trained: its loss is computed outside of the model.
    """
    return output.detach().requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output


def _allow_views() -> None:
    """Silence FSDP2's warning that a module returns a view: it fears a change of that view in place; there is none."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
