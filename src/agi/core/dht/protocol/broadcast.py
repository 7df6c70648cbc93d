"""What a node still has to pass on, in the spare room of messages (Das et al. 2002, "SWIM", section 4.1).

A claim is handed out lambda x ceil(log10(members + 1)) times and then forgotten: with high probability everybody has it
by then. Those handed out least often go first, and of these the newest. A claim replaces an older one about the same
member, so that the queue never holds more than one of each.

>>> queue = BroadcastQueue(retransmit_mult=2)
>>> queue.add(Claim("a", disk=0, boot=1, incarnation=0, status=0))
>>> [len(queue.take(members=3)) for _ in range(3)]
[1, 1, 0]
"""

from __future__ import annotations

import math

from agi.core.dht.protocol.messages import Claim

CLAIMS_BYTES_MAX = 1200
"""Of the claims that one message carries: it fits a packet of most networks."""
CLAIMS_MAX = 32
"""Claims of one message."""
_FIXED_BYTES = 24


def claim_bytes(claim: Claim) -> int:
    """An upper bound of what a claim takes in a message, as long as its counters are below 2^32; node ids are ASCII."""
    return _FIXED_BYTES + len(claim.node) + len(claim.by)


class BroadcastQueue:
    """Claims by how often they were handed out."""

    __slots__ = ("_mult", "_tier_of", "_tiers")

    def __init__(self, retransmit_mult: int) -> None:
        self._mult = retransmit_mult
        self._tiers: list[dict[str, Claim]] = []
        self._tier_of: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._tier_of)

    def limit(self, members: int) -> int:
        """How often a claim is handed out in a cluster of that size."""
        return self._mult * math.ceil(math.log10(members + 1))

    def add(self, claim: Claim) -> None:
        """To be passed on, instead of what was to be said of that member before."""
        self.drop(claim.node)
        if not self._tiers:
            self._tiers.append({})
        self._tiers[0][claim.node] = claim
        self._tier_of[claim.node] = 0

    def drop(self, node: str) -> None:
        """What is queued about that member no longer matters."""
        tier = self._tier_of.pop(node, None)
        if tier is not None:
            del self._tiers[tier][node]

    def take(self, members: int, bytes_left: int = CLAIMS_BYTES_MAX) -> list[Claim]:
        """The claims for one message, within its bounds."""
        if not self._tier_of:
            return []
        taken: list[Claim] = []
        for tier in self._tiers:
            for claim in reversed(tier.values()):
                bytes_left -= _FIXED_BYTES + len(claim.node) + len(claim.by)  # claim_bytes, without a call
                if bytes_left < 0 or len(taken) == CLAIMS_MAX:
                    break
                taken.append(claim)
            else:
                continue
            break
        tiers, tier_of, limit = self._tiers, self._tier_of, self.limit(members)
        if len(tiers) < limit:
            tiers.extend({} for _ in range(limit - len(tiers)))
        for claim in reversed(taken):  # from the last to the first, so that the newest stay the newest
            node = claim.node
            number = tier_of[node]
            del tiers[number][node]
            number += 1
            if number < limit:
                tiers[number][node] = claim
                tier_of[node] = number
            else:
                del tier_of[node]
        return taken
