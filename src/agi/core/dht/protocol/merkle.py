"""Hash trees over a node's records, so that replicas find what differs without reading what does not.

After Merkle ("A Digital Signature Based on a Conventional Encryption Function", CRYPTO 1987) as used by Dynamo (section
4.7), with sums in place of nested hashes: a node of a tree is the sum, modulo 2^64, of one 64-bit number for each
record under it. So a record changes its leaf by one subtraction and addition, and every level above, up to one root for
any set of ranges, is added up when it is asked for.

What a record counts for (`contribution`) is its checksum, a hash of header, key and value that is the same wherever the
same write is held. A record with a TTL counts by key, version and expiry alone, so that a replica that has shrunk it
already does not differ from one that has not (PROTOCOLS H1). Tombstones count.

A tree covers a range of tokens, `first` to `last`, cut into leaves of 2^shift tokens. Two trees of a range are compared
at the greater shift: 2^k neighbouring leaves add up to the leaf of shift + k.

    range 0..99, shift 4: leaves 0..15, 16..31, ..., 96..99; node (shift 5, index 1) = tokens 32..63 = leaves 2 + 3

The write path is not to pay for this. It only notes which keys have changed and what their old records counted for
(`changed`); `fold` brings that into the trees later, a few keys at a time, each key once however often it was written.
The law that makes it exact: for every key that is not pending, its tree counts precisely the record that the store
holds; for a pending one it counts `pending[key]`. Mostly no look is needed to see that a key is pending: once every
record was met by a scan or a fold, one that compares above all of them has been written since.

Trees live in memory. A range is unknown until a scan has built its tree (`begin`, `page`, `finish`) while writes go on:
keys of a range that is being built stay pending, and what the scan met of them is what they count for from then on. A
known range that has outgrown its leaves is built anew in the same way, and answers from its old tree meanwhile.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import filterfalse

import xxhash

from agi.core.dht.protocol.record import EXPIRES, FLAGS

MASK = (1 << 64) - 1
LEAVES_MIN = 16
"""Leaves of the smallest tree: 128 bytes a range."""
LEAF_KEYS = 12
"""A tree is built with about so many keys a leaf, or half. To find 1 % of random differences costs 4 / k bytes a key
for leaves of k keys, and 0.04 k for the records in the leaves that differ: least at k = 10."""
LEAF_KEYS_MAX = 2 * LEAF_KEYS
"""Past this, on average, it is built anew."""
FOLD_AT = 16_384
"""Pending keys from which on they are folded without waiting for an exchange (about 3 MB)."""
PENDING_MAX = 262_144
"""Pending keys past which all trees are given up and built anew: changes came faster than they could be folded."""

_ABOVE_ALL = b"\xff" * 9
"""Greater than any record: clocks do not come that far."""
_FLAGS_AND_CHECKSUM = struct.Struct(f">{FLAGS}xB7xQ").unpack_from
_hash_int: Callable[..., int] = xxhash.xxh3_64_intdigest


def contribution(key: bytes, header: bytes) -> int:
    """What a record adds to its leaf: equal for equal writes, whatever has been shrunk."""
    if header[FLAGS] & EXPIRES:
        return _hash_int(header[:16] + header[32:40] + key)
    return int.from_bytes(header[24:32], "big")


class _Sums:
    """Leaves of one range. Whoever adds to one adds to `total` too, what all of them add up to: a root costs no look at
    the leaves, however many there are."""

    __slots__ = ("count", "leaves", "shift", "total")

    def __init__(self, width: int, keys: int) -> None:
        leaves = max(LEAVES_MIN, -(-keys // LEAF_KEYS))
        self.shift = max(0, (width - 1).bit_length() - (leaves - 1).bit_length())
        self.leaves = array("Q", bytes(8 * (((width - 1) >> self.shift) + 1)))
        self.count = 0
        self.total = 0


class Tree:
    """The tree of one range; it does not wrap. `known`: its sums are those of the records, but for pending keys."""

    __slots__ = ("building", "first", "known", "last", "strikes", "sums")

    def __init__(self, first: int, last: int) -> None:
        self.first = first
        self.last = last
        self.known = False
        self.sums = _Sums(self.width, 0)
        self.building: _Sums | None = None
        self.strikes = 0
        """How often in a row it differed from a replica's although no record did."""

    @property
    def width(self) -> int:
        return self.last - self.first + 1

    @property
    def bits(self) -> int:
        """The shift at which the whole range is one node."""
        return (self.width - 1).bit_length()

    @property
    def outgrown(self) -> bool:
        return self.sums.count > LEAF_KEYS_MAX * len(self.sums.leaves) and self.sums.shift > 0

    def span(self, shift: int, index: int) -> tuple[int, int]:
        """First and last token of a node."""
        first = self.first + (index << shift)
        return first, min(self.last, first + (1 << shift) - 1)

    def width_in_nodes(self, shift: int) -> int:
        return ((self.width - 1) >> shift) + 1

    def children(self, shift: int, index: int, below: int) -> tuple[int, list[int]]:
        """Sums of the nodes of shift `below`, or that of the leaves if these are larger, under a node of `shift`: the
        index of the first of them, and the sums. Where the node is no larger than a leaf: none."""
        sums = self.sums
        below = max(below, sums.shift)
        if below >= shift:
            return 0, []
        first = index << shift - below
        end = min((index + 1) << shift - below, self.width_in_nodes(below))
        step = below - sums.shift
        leaves = sums.leaves
        if not step:
            return first, leaves[first:end].tolist()
        return first, [sum(leaves[i << step : (i + 1) << step]) & MASK for i in range(first, end)]


class HashTrees:
    """The trees of all ranges that a node replicates, in token order.

    Args:
        token_of: the 8 big-endian bytes of a key's ring token.

    Attributes:
        trees: by position; `adopt` sets them.
        pending: what a changed key counts for in its tree, 0 for nothing; as the module says.
        wake: told when there is much to fold.
        lost: how often all trees were given up.
    """

    def __init__(self, token_of: Callable[[bytes], bytes]) -> None:
        self.trees: list[Tree] = []
        self.pending: dict[bytes, int] = {}
        self.wake: Callable[[], None] = lambda: None
        self.lost = 0
        self._token_of = token_of
        self._lasts: list[int] = []
        self._newest = b""  # no record that a scan or a fold met is greater, nor are others of its version
        self._mark = _ABOVE_ALL  # `_newest`, once they have met every record but those of pending keys
        self._met_all = False

    # --- ranges

    def adopt(self, ranges: Iterable[tuple[int, int]]) -> None:
        """From now on these ranges are kept, (first, last) each: sorted, apart, not wrapping. Those that were there
        before keep what is known of them; what was being built is not."""
        before = {(tree.first, tree.last): tree for tree in self.trees}
        self.trees = [before.get(bounds) or Tree(*bounds) for bounds in ranges]
        self._met_all, self._mark = False, _ABOVE_ALL
        self._lasts = [tree.last for tree in self.trees]
        self.abort(range(len(self.trees)))

    def at(self, token: int) -> int:
        """The position of the range of a token; -1 where the node does not hold it."""
        index = bisect_left(self._lasts, token)
        return index if index < len(self.trees) and token >= self.trees[index].first else -1

    def total(self, positions: Iterable[int]) -> tuple[int, int]:
        """The root over some ranges: (sum, records)."""
        total = count = 0
        for position in positions:
            sums = self.trees[position].sums
            total += sums.total
            count += sums.count
        return total & MASK, count

    @property
    def unknown(self) -> int:
        """Ranges without a tree."""
        return sum(not tree.known for tree in self.trees)

    # --- changes

    def changed(self, keys: Sequence[bytes], headers: Sequence[bytes | None], inserts: Sequence[bytes]) -> None:
        """The records of these keys, whose headers were those until now, are about to change; `inserts` are those that
        had none. Called before they do, by the write path: a key written again since the last fold costs 10 to 30 ns, a
        new one 100, any other 250."""
        if not inserts and min(headers) > self._mark:  # type: ignore[type-var,operator]  # there is no None
            return
        pending = self.pending
        if len(inserts) == len(keys):
            pending.update(dict.fromkeys(filterfalse(pending.__contains__, keys), 0))
        else:
            for key, header in zip(keys, headers, strict=True):
                if key not in pending:
                    pending[key] = contribution(key, header) if header is not None else 0
        if len(pending) >= FOLD_AT:
            if len(pending) > PENDING_MAX:
                self.lose()
            self.wake()

    def fold(self, keys: Sequence[bytes], headers: Sequence[bytes | None], unsettled: Collection[bytes]) -> None:
        """Brings pending keys into their trees. `headers` are what the store holds of them at this moment; `unsettled`
        are keys whose records are about to change, so that they stay pending."""
        pending, trees, lasts = self.pending, self.trees, self._lasts
        end = len(trees)
        self._meet(max(filter(None, headers), default=b""))
        for key, header, token in zip(keys, headers, self._tokens(keys), strict=True):
            old = pending.get(key)
            if old is None:
                continue  # folded meanwhile
            at = bisect_left(lasts, token)
            if at == end or token < (tree := trees[at]).first:
                del pending[key]
                continue
            if tree.building is not None:
                continue
            if not tree.known:
                if key not in unsettled:
                    del pending[key]
                continue
            new = 0
            if header is not None:
                flags, new = _FLAGS_AND_CHECKSUM(header)
                if flags & EXPIRES:
                    new = contribution(key, header)
            if key in unsettled:
                pending[key] = new  # it counts what the store holds, and will change
            else:
                del pending[key]
            if new != old:
                sums = tree.sums
                leaf = token - tree.first >> sums.shift
                sums.leaves[leaf] = sums.leaves[leaf] + new - old & MASK
                sums.total = sums.total + new - old & MASK
                if not old:
                    sums.count += 1
                elif not new:
                    sums.count -= 1

    def _tokens(self, keys: Iterable[bytes]) -> Sequence[int]:
        packed = b"".join(map(self._token_of, keys))
        return struct.unpack(f">{len(packed) // 8}Q", packed)

    def lose(self) -> None:
        """Nothing is known any more."""
        self.lost += 1
        self._met_all, self._mark = False, _ABOVE_ALL
        self.pending.clear()
        for tree in self.trees:
            tree.known, tree.building = False, None

    # --- building

    def to_build(self, tokens_max: int) -> list[int]:
        """Positions of ranges to be built together, in token order: unknown ones, at most so many tokens of them but at
        least one; where there are none, such as have outgrown their leaves."""
        for wanted in (lambda tree: not tree.known, lambda tree: tree.outgrown):
            found: list[int] = []
            tokens = 0
            for position, tree in enumerate(self.trees):
                if wanted(tree):
                    tokens += tree.width
                    if found and tokens > tokens_max:
                        break
                    found.append(position)
            if found:
                return found
        return []

    def begin(self, positions: Iterable[int], keys_per_token: float, unsettled: Iterable[bytes]) -> None:
        """The scan of these ranges begins; so many keys a token are expected. `unsettled`: as for `fold`, of the whole
        store; the scan may not meet what they will be. It costs a look at every pending key."""
        pending, chosen = self.pending, set(positions)
        for key in unsettled:
            pending.setdefault(key, 0)
        # in the tree to come a key counts what the scan meets of it; it need not meet what is pending
        for key, token in zip(list(pending), self._tokens(pending), strict=True):
            if self.at(token) in chosen:
                pending[key] = 0
        for position in chosen:
            tree = self.trees[position]
            keys = tree.sums.count if tree.known else int(tree.width * keys_per_token)
            tree.building = _Sums(tree.width, keys)

    def page(self, items: Collection[tuple[bytes, bytes]]) -> None:
        """Records (or headers of them) that the scan met."""
        pending, trees = self.pending, self.trees
        newest = b""
        for (key, header), token in zip(items, self._tokens([key for key, _ in items]), strict=True):
            if header > newest:
                newest = header
            at = self.at(token)
            if at < 0 or (sums := trees[at].building) is None:
                continue
            counts = contribution(key, header)
            leaf = token - trees[at].first >> sums.shift
            sums.leaves[leaf] = sums.leaves[leaf] + counts & MASK
            sums.total = sums.total + counts & MASK
            sums.count += 1
            if key in pending:
                pending[key] = counts
        self._meet(newest)

    def _meet(self, record: bytes) -> None:
        if record > self._newest:
            self._newest = record[:FLAGS] + b"\xff"
            if self._met_all:
                self._mark = max(self._mark, self._newest)

    def finish(self, positions: Iterable[int]) -> None:
        """The scan has met every record of these ranges."""
        for position in positions:
            tree = self.trees[position]
            if tree.building is not None:
                tree.sums, tree.building, tree.known, tree.strikes = tree.building, None, True, 0
        self._look_at_mark()

    def _look_at_mark(self) -> None:
        if not self._met_all and not self.unknown:
            self._met_all, self._mark = True, self._newest

    def abort(self, positions: Iterable[int]) -> None:
        """The scan failed. A range that was known is not any more: what its pending keys count for belongs to the tree
        that will not be."""
        for position in positions:
            tree = self.trees[position]
            if tree.building is not None:
                tree.building, tree.known = None, False

    def forget(self, position: int) -> None:
        """This tree is not to be trusted: build it anew."""
        self.trees[position].known = False

    def empty(self, unsettled: Iterable[bytes]) -> None:
        """The store holds nothing: every tree is known, and what is pending, `unsettled` too (as for `fold`), counts
        nothing yet."""
        self.pending = dict.fromkeys([*self.pending, *unsettled], 0)
        for tree in self.trees:
            tree.building = None
            tree.known = True
        self._look_at_mark()
