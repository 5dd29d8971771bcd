"""Inversion and editing: the noise that would have drawn an example, and what else it draws.

    recording = record(key, denoise, process, x0, cond, times=times)
    edited = edit(key, denoise, process, recording, another_cond)

The same two for tokens (`inversion.categorical`, DICE) and for continuous states: the noise space of a stochastic
sampler (CycleDiffusion, edit-friendly DDPM), or the ODE of a deterministic one (`inversion.ode`, DDIM inversion).
"""

from ddjax.inversion.recording import Recording, Replay, edit, record, round_trip_error

__all__ = ["Recording", "Replay", "edit", "record", "round_trip_error"]
