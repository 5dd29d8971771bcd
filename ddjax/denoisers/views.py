"""What a network is shown beside the state, or of it: clean sites, groups of sites, some sites only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ddjax.denoisers.given import Given
from ddjax.denoisers.layers.attention import Layout, everywhere, group_causal, group_teacher_forced, within
from ddjax.sites import put
from ddjax.types import Past, SoftTokens, State


class View(NamedTuple):
    """The parts of a condition that say how a network runs; a network's sites are tokens, or patches of an image.

    groups: a number of each site: it sees its own group and those of lower numbers, in the place of the network's own
        rule. clean: the clean state: one pass gives the output of every group as if those before it were clean.
    segments: a window of text holds several documents, the same number at the sites of one (`data.packing`): sites see
        their own document only, and positions count from its start.
    past, sites: the network runs at these sites only and takes the keys and values of the others from the past, as an
        earlier pass had them at the taps `block/i/keys` and `/values`. A site beyond the last counts for nothing.
    """

    cond: Any = None  # the rest, what the network is told: labels, ... (`given.Given`)
    clean: State | None = None
    groups: Int[Array, "batch length"] | None = None
    segments: Int[Array, "batch length"] | None = None
    past: Past | None = None  # `(batch, depth, length, heads, head)` each
    sites: Int[Array, "batch some"] | None = None

    @classmethod
    def of(cls, cond: Any) -> View:
        """Of entries side by side, or each in another's "cond". Raises ValueError for what does not go together."""
        how, what = set(cls._fields) - {"cond"}, set(Given._fields) - {"cond"}
        given, told = {}, {}
        while isinstance(cond, Mapping) and cond.keys() & (how | what):
            if unknown := sorted(cond.keys() - how - what - {"cond"}):
                known = ", ".join((*cls._fields, *Given._fields[1:]))
                raise ValueError(f"cond has entries {', '.join(unknown)}; beside {known} there are none")
            given |= {name: value for name, value in cond.items() if name in how}
            told |= {name: value for name, value in cond.items() if name in what}
            cond = cond.get("cond")
        view = cls({**told, "cond": cond} if told else cond, **given)
        if (view.past is None) != (view.sites is None) or (view.past is not None and view.clean is not None):
            raise ValueError('cond["past"] and cond["sites"] go together, and without cond["clean"]')
        if view.segments is not None and view.sites is not None:
            raise ValueError('cond["segments"] is of windows that are run whole: leave out cond["sites"]')
        return view

    def check(self, xt: State | SoftTokens, axes: int, depth: int, length: int, timed: bool) -> None:
        """Raise ValueError where it does not fit a network of `length` sites, for states with so many axes."""
        hard = not isinstance(xt, SoftTokens) and xt.ndim == axes
        if not hard and self.past is not None:
            raise ValueError("soft tokens cannot be run at some sites only: give hard ones, or no past")
        if not hard and self.clean is not None:
            raise ValueError("soft tokens have no teacher-forced pass: give hard ones, or no clean sequence")
        if self.clean is not None and (self.clean.shape != xt.shape or _whole(self.clean) != _whole(xt)):
            raise ValueError(
                f'cond["clean"] has shape {self.clean.shape}, {self.clean.dtype}; expected the clean tokens of xt, '
                f"{xt.shape}"
            )
        batch = xt.ids.shape[0] if isinstance(xt, SoftTokens) else xt.shape[0]
        for name, value in (("groups", self.groups), ("segments", self.segments)):
            if value is not None and (value.shape != (batch, length) or not _whole(value)):
                raise ValueError(
                    f'cond["{name}"] has shape {value.shape}, {value.dtype}; expected an int for each of the '
                    f"network's sites, {(batch, length)}"
                )
        if self.groups is not None and timed:
            raise ValueError("groups are for networks without time: sites of several groups stand side by side")
        if self.past is None:
            return
        expected = (batch, depth, length)
        if any(v.shape[:3] != expected for v in self.past) or self.sites.shape[:1] != (batch,):
            raise ValueError(
                f'cond["past"] has keys of shape {self.past[0].shape} and cond["sites"] has shape {self.sites.shape}; '
                f"expected {expected} and two axes more, and ({batch}, some)"
            )

    def layout(
        self, length: int, groups: Int[Array, "*batch length"] | None, own: Layout | None = None
    ) -> Layout | None:
        """Who sees whom: by groups where there are any, else as the network itself says (None: all)."""
        if groups is not None:
            own = (group_causal if self.clean is None else group_teacher_forced)(groups)
        elif self.clean is not None:
            raise ValueError(
                'cond has a "clean" sequence but the network sees all of xt: build it with block=..., or give '
                'cond["groups"]'
            )
        own = own if self.segments is None else within(self.segments, own)
        if self.past is None:
            return own
        return (everywhere(length) if own is None else own).at(self.sites, self.past)

    def seen(self, x: Any, clean: Any = None) -> Any:
        """What the network embeds, from the state and the clean one, sites on the second axis."""
        if clean is not None:
            return jnp.concatenate([x, clean], axis=1)
        return x if self.sites is None else jax.tree.map(self.at, x)

    def image(self, x: Array) -> Array:
        """What the network is shown of an image, sites on the second axis: clean sites as those of the state."""
        return self.seen(x, None if self.clean is None else x)

    def hint(self, x: Array) -> Array:
        """The same of a side network's image. Raises ValueError for a pass behind a past, of which a side has none."""
        if self.past is not None:
            raise ValueError("a controlled network runs whole: its condition says nothing of a past")
        return self.image(x)

    def at(self, x: Array) -> Array:
        """What stands at the sites, of a pass at some of them; else x itself."""
        if self.sites is None:
            return x
        where = self.sites.reshape(*self.sites.shape, *(1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, where, axis=1, mode="clip")

    def everywhere(self, y: Array, length: int) -> Array:
        """Outputs at all sites: 0 where the network did not run."""
        if self.sites is None:
            return y
        return put(y, self.sites, jnp.zeros((y.shape[0], length, *y.shape[2:]), y.dtype))


def _whole(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.integer)
