"""Moves what a schedule says from one live model to another: this process' part of a reshard.

Memory first, then the process' own elements, then the rounds of messages. A process that fails goes
on taking part in the rounds, without its elements, so that no other one waits for it for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from lading import placing, targeting, writing
from lading import ranks as ranks_module
from lading.exports.live import Live
from lading.messages import Exchange, Packed, Schedule
from lading.parameter import BasevLLMParameter
from lading.plan import Plan, Share
from lading.ranks import Ranks
from lading.regions import Region

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Carrier"]


@dataclass(slots=True, kw_only=True)
class Carrier:
    """What this process does, when all have agreed that it can be done.

    source, target   its parameters of either model, None for nothing
    model            the target
    after, share     the target's plan, and what it says of this process' rank
    todo             what this process does of the routes
    place, group     the process in the group
    on_gpu           whether messages are in GPU memory
    """

    source: Live | None
    target: Live | None
    model: nn.Module | None
    after: Plan
    share: Share | None
    todo: Schedule
    place: Ranks
    group: ProcessGroup | None
    on_gpu: bool
    kept_bytes: int = 0
    _held: Mapping[str, torch.Tensor] = field(default_factory=dict)
    _memory: dict[str, torch.Tensor] = field(default_factory=dict)
    _wanted: dict[str, torch.Tensor] = field(default_factory=dict)
    _buffers: tuple[torch.Tensor, ...] = ()

    def __post_init__(self) -> None:
        if self.source is not None:
            self._held = self.source.tensors

    @property
    def is_in_place(self) -> bool:
        """Whether the target has memory that is written before all is known to be well."""
        live = self.target
        return live is not None and any(not t.is_meta for t in live.tensors.values())

    def allocate(self, device: torch.device | str | None) -> None:
        """Memory for parameters on meta and for messages."""
        if self.target is not None and self.model is not None:
            state = dict(targeting.state_of(self.model))
            for name, tensor in self.target.tensors.items():
                own = state[name]
                if own.is_meta:
                    place = placing.place_of(device, self.place)
                    own = placing.memory_for(own, place)
                self._memory[name] = own.detach()
                order = _order(state[name])
                back = tuple(order.index(dim) for dim in range(len(order)))
                self._wanted[name] = (
                    self._memory[name].permute(back) if back else self._memory[name]
                )
                assert self._wanted[name].shape == tensor.shape, "the stored form, with memory"
        place = torch.device("cpu")
        if self.on_gpu:
            place = torch.device("cuda", torch.cuda.current_device())
        exchanges = self.todo.exchanges
        sizes = (
            max((one.sent_bytes for one in exchanges), default=0),
            max((one.received_bytes for one in exchanges), default=0),
        )
        self._buffers = tuple(torch.empty(n, dtype=torch.uint8, device=place) for n in sizes)

    def move(self) -> None:
        """Own elements first, then the rounds; padding is zeroed."""
        failure: Exception | None = None
        try:
            self._keep()
        except Exception as error:
            failure = error
        for exchange in self.todo.exchanges:
            failure = self._take_part(exchange, failure)
        if failure is not None:
            raise failure
        for tensor in self._wanted.values():
            if tensor.is_cuda:
                torch.cuda.synchronize(tensor.device)
                break

    def _keep(self) -> None:
        for copy in self.todo.kept:
            values = writing.view_of(self._held[copy.source], copy.source_region)
            values = writing.permuted(values, copy)
            writing.write(self._wanted[copy.target], copy.target_region, values)
            self.kept_bytes += values.numel() * values.element_size()
        for fill in self.share.fills if self.share is not None else ():
            writing.fill(self._wanted[fill.target], fill.region)

    def _take_part(self, exchange: Exchange, failure: Exception | None) -> Exception | None:
        """One round; what went wrong in it, or before. After that the messages are anything."""
        assert self.group is not None, "a process that is alone sends nothing"
        sent, received = self._buffers
        sends, receives = _slices(sent, exchange.sends), _slices(received, exchange.receives)
        if failure is None:
            try:
                self._pack(exchange.sends, sends)
            except Exception as error:
                failure = error
        ranks_module.send_and_receive(sends, receives, self.group)
        if failure is None:
            try:
                self._unpack(exchange.receives, receives)
            except Exception as error:
                failure = error
        return failure

    def _pack(self, sends: Mapping[int, Packed], rooms: Mapping[int, torch.Tensor]) -> None:
        for peer, packed in sends.items():
            for at, message in packed.messages:
                values = writing.view_of(self._held[message.source], message.region)
                room = rooms[peer][at : at + message.num_bytes].view(values.dtype)
                writing.write(room.view(values.shape), Region.whole(values.shape), values)

    def _unpack(self, receives: Mapping[int, Packed], rooms: Mapping[int, torch.Tensor]) -> None:
        for peer, packed in receives.items():
            for at, message in packed.messages:
                room = rooms[peer][at : at + message.num_bytes]
                for copy in message.copies:
                    wanted = self._wanted[copy.target]
                    values = room.view(wanted.dtype).view(message.region.size)
                    writing.write(wanted, copy.target_region, writing.permuted(values, copy))

    def install(self, model: nn.Module) -> None:
        """Gives parameters on meta their memory; each is as if it had just been loaded."""
        orders = {name: _order(tensor) for name, tensor in targeting.state_of(model)}
        placing.install(model, self.after, self._memory)
        for name, tensor in targeting.state_of(model):
            if isinstance(tensor, BasevLLMParameter):
                tensor.stored_order = orders[name]

    @property
    def sent_bytes(self) -> int:
        """To other processes."""
        return _message_bytes(one.sends for one in self.todo.exchanges)

    @property
    def received_bytes(self) -> int:
        """From other processes."""
        return _message_bytes(one.receives for one in self.todo.exchanges)

    @property
    def buffer_bytes(self) -> int:
        """Of memory for messages."""
        return sum(buffer.numel() for buffer in self._buffers)


def _order(tensor: torch.Tensor) -> tuple[int, ...]:
    return tensor.stored_order if isinstance(tensor, BasevLLMParameter) else ()


def _slices(buffer: torch.Tensor, packed: Mapping[int, Packed]) -> dict[int, torch.Tensor]:
    """One piece of the buffer for each other process."""
    at, found = 0, {}
    for peer, one in packed.items():
        found[peer] = buffer[at : at + one.num_bytes]
        at += one.num_bytes
    return found


def _message_bytes(sides: Iterable[Mapping[int, Packed]]) -> int:
    return sum(
        message.num_bytes
        for side in sides
        for packed in side.values()
        for _, message in packed.messages
    )
