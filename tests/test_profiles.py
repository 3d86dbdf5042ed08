"""Each profile against its definition, the laws that hold for all of them, and the registry."""

import math
from random import Random

import pytest
import reference
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from polyak import (
    EMA,
    HalfLife,
    Momentum,
    PowerFunction,
    ProfileError,
    Smoothing,
    Time,
    TimeError,
    Uniform,
    Warmup,
    Window,
)
from polyak.profiles import Cooldown, NamedProfile, Profile, forms, named, options, parse, parse_words
from polyak.profiles.cooldown import SHAPES


def cubic(x: float) -> float:
    return (1 - x) ** 3


PROFILES = [
    HalfLife("10ba"),
    HalfLife("1.5ep"),
    HalfLife("1000000sp"),
    HalfLife("0ba"),
    HalfLife("infba"),
    HalfLife("10ba", unbiased=True),
    HalfLife("0ba", unbiased=True),
    HalfLife("infba", unbiased=True),
    HalfLife("0.001ba", unbiased=True),
    Smoothing(0.0),
    Smoothing(0.99),
    Smoothing(1.0),
    Uniform(),
    Uniform("20ba"),
    PowerFunction(sigma_rel=0.05),
    PowerFunction(sigma_rel=0.25),
    PowerFunction(gamma=0.0),
    PowerFunction(gamma=-0.5),
    PowerFunction(half_life_fraction=0.05),
    Warmup(HalfLife("50ba")),
    Warmup(HalfLife("0ba")),
    Warmup(Smoothing(0.999)),
    Warmup(Smoothing(0.9999), power=2 / 3),
    Warmup(HalfLife("infba"), power=0.75, inv_gamma=20.0),
    Window("10ba"),
    Window("infba"),
    *(Cooldown("10ba", shape) for shape in SHAPES),
    Cooldown("infba", "1-sqrt"),
    Cooldown("50ba", cubic),
    Cooldown("10ba", floor=0.25),
    Cooldown("50ba", "cosine", floor=0.1, snap=True),
    Momentum(0.9, 1.0, over="100ba"),
    Momentum(0.5, 0.75, "linear", over="7ba"),
    Momentum(0.0, 1.0, over="20ba"),
    *(parse(name, form.example) for name, form in forms().items()),  # a new profile is tested without a line here
]
moments = st.floats(0, 200) | st.integers(0, 200).map(float)
profiles = st.sampled_from(PROFILES)


@settings(deadline=None)
@given(profiles, moments)
def test_the_decay_over_no_time_is_one(profile, now) -> None:
    assert profile.decay(now, now) == 1.0


@settings(deadline=None)
@given(profiles, moments, moments, moments)
@example(HalfLife("10ba", unbiased=True), 0.0, 0.0, 5e-324)
def test_a_decay_is_a_fraction_that_falls_with_time_and_rises_with_the_start(profile, a, b, c) -> None:
    a, b, c = sorted((a, b, c))
    assert 0 <= profile.decay(a, c) <= 1
    assert profile.decay(a, c) <= profile.decay(a, b) * (1 + 1e-12)
    assert profile.decay(a, c) <= profile.decay(b, c) * (1 + 1e-12)


@settings(deadline=None)
@given(profiles, moments, moments, moments)
@example(Warmup(HalfLife("50ba")), 0.25, 0.75, 3.5)
def test_the_decay_of_a_recursive_profile_splits_at_any_moment(profile, a, b, c) -> None:
    assume(profile.recursive)
    a, b, c = sorted((a, b, c))
    assert profile.decay(a, c) == pytest.approx(profile.decay(a, b) * profile.decay(b, c), rel=1e-9, abs=1e-300)


def test_the_decay_of_a_window_does_not_split_so_it_is_not_recursive() -> None:
    window = Window("10ba")
    assert not window.recursive
    assert window.decay(5, 15) != window.decay(5, 10) * window.decay(10, 15)


@settings(deadline=None)
@given(profiles, st.floats(0, 100), st.floats(-100, -1e-6))
def test_profiles_refuse_time_that_runs_backwards(profile, now, step) -> None:
    with pytest.raises(ProfileError, match="0 <= before <= now"):
        profile.decay(now, now + step)
    with pytest.raises(ProfileError, match="0 <= before <= now"):
        profile.decay(step, now)


NEWEST = [
    (Smoothing(0.9), lambda t: reference.newest_smoothing(0.9, t) if t > 1 else 0.1),
    (HalfLife(Time(-1 / math.log2(0.9), "ba")), lambda t: 0.1),
    (HalfLife(Time(-1 / math.log2(0.9), "ba"), unbiased=True), lambda t: reference.newest_debiased(0.9, t)),
    (Uniform(), reference.newest_uniform),
    (Uniform("5ba"), lambda t: 1.0 if t <= 5 else reference.newest_uniform(t - 5)),
    (PowerFunction(gamma=6.94), lambda t: reference.newest_power(6.94, t)),
    (Warmup(Smoothing(0.99)), lambda t: reference.newest_diffusers(0.99, t)),
    (Warmup(Smoothing(0.99), power=2 / 3), lambda t: reference.newest_warmup(0.99, 2 / 3, 1.0, t)),
    (Warmup(Smoothing(0.99), power=0.75, inv_gamma=5.0), lambda t: reference.newest_warmup(0.99, 0.75, 5.0, t)),
]


@pytest.mark.parametrize(("profile", "newest"), NEWEST, ids=[repr(profile) for profile, _ in NEWEST])
@pytest.mark.parametrize("t", [1, 2, 3, 5, 6, 7, 100, 2000])
def test_the_share_of_the_newest_weights_is_that_of_the_definition(profile, newest, t) -> None:
    assert 1 - profile.decay(t - 1, t) == pytest.approx(newest(t), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94), (0.15, 3.56), (0.20, 1.83), (0.25, 0.72), (12**-0.5, 0.0)]
)
def test_sigma_rel_gives_the_published_gamma(sigma_rel, gamma) -> None:
    assert PowerFunction(sigma_rel=sigma_rel).exponent == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("now", [10.0, 1e6])
def test_a_half_life_fraction_is_the_share_of_the_time_so_far(fraction, now) -> None:
    # The rate of forgetting at a moment is that of an exponential average with this half-life.
    step = now * 1e-7
    kept = PowerFunction(half_life_fraction=fraction).decay(now, now + step)
    assert kept == pytest.approx(HalfLife(Time(fraction * now, "ba")).decay(0, step), rel=1e-9)
    assert round(PowerFunction(half_life_fraction=0.05).exponent, 2) == 12.86


@settings(deadline=None)
@given(st.floats(0.005, 12**-0.5))
def test_sigma_rel_is_the_standard_deviation_of_the_profile(sigma_rel) -> None:
    # Over the run the density is (g + 1) t^g: its mean and variance are those of a beta distribution.
    g = PowerFunction(sigma_rel=sigma_rel).exponent
    variance = (g + 1) / ((g + 2) ** 2 * (g + 3))
    assert math.sqrt(variance) == pytest.approx(sigma_rel, rel=1e-9)


@settings(deadline=None)
@given(st.floats(0.01, 1e6), st.floats(0, 1e6))
def test_half_of_the_average_is_left_after_one_half_life(span, start) -> None:
    assert HalfLife(Time(span, "ba")).decay(start, start + span) == pytest.approx(0.5, rel=1e-6)


def test_a_half_life_of_zero_keeps_nothing_and_an_infinite_one_everything() -> None:
    assert HalfLife("0ba").decay(1, 2) == 0.0
    assert HalfLife("infba").decay(1, 2) == 1.0
    assert HalfLife("infba", unbiased=True).decay(1, 2) == 0.5


def test_a_batch_that_is_kappa_times_as_large_decays_like_kappa_small_ones() -> None:
    samples = HalfLife("640sp")
    assert samples.decay(0, 64 * 8) == pytest.approx(samples.decay(0, 8) ** 64)


def test_a_window_weights_its_moments_equally() -> None:
    assert [Window("4ba").decay(t, 10) for t in (5, 6, 7, 8, 9, 10)] == [0, 0, 0.25, 0.5, 0.75, 1]
    assert [Window("20ba").decay(t, 10) for t in (0, 5, 10)] == [0, 0.5, 1]


@settings(deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.sampled_from([*SHAPES, lambda x: (1 - x) ** 3, lambda x: float(x < 0.5)]),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.integers(0, 2**32),
)
def test_a_cooldown_is_the_run_whose_updates_are_scaled_by_the_falling_rate(steps, width, shape, floor, seed) -> None:
    random = Random(seed)
    profile, falling = Cooldown(Time(width, "ba"), shape, floor), SHAPES[shape] if isinstance(shape, str) else shape

    def rate(x: float) -> float:
        return floor + (1 - floor) * falling(x)

    updates = [random.gauss(0, 1) for _ in range(steps)]
    weights, position = [], random.gauss(0, 1)
    first, width = position, min(width, steps)
    scaled = position
    for t, update in enumerate(updates):
        position += update
        weights.append(position)
        scaled += rate(max(0.0, (t - (steps - width)) / width)) * update
    average = sum((profile.decay(t + 1, steps) - profile.decay(t, steps)) * one for t, one in enumerate(weights))
    average += profile.decay(0, steps) * first
    assert average == pytest.approx(scaled, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("k", [0, 1, 37, 99])
def test_a_momentum_is_that_of_byol_at_each_step(k) -> None:
    momentum = Momentum(0.996, 1.0, "cosine", over="100ba")
    assert momentum.decay(k, k + 1) == pytest.approx(1 - (1 - 0.996) * (math.cos(math.pi * k / 100) + 1) / 2, rel=1e-14)
    assert Momentum(0.996, over="100ba").decay(100, 1000) == 1.0
    assert Momentum(0.5, 0.75, "linear", over="2ba").decay(0, 4) == pytest.approx(0.5 * 0.625 * 0.75 * 0.75)


@pytest.mark.parametrize(
    ("shape", "online"),
    [("linear", Uniform()), ("1-sqrt", PowerFunction(gamma=-0.5)), ("1-square", PowerFunction(gamma=1.0))],
)
def test_the_alternative_to_a_cooldown_in_one_buffer_is_the_same_average(shape, online) -> None:
    with pytest.raises(ProfileError, match="record the run.*or fix its start: EMA") as error:
        EMA(profile=Cooldown("20ba", shape))
    assert repr(online).split("(")[0] in str(error.value)
    cooldown = Cooldown("20ba", shape)
    for before in (100, 104, 117, 120):
        assert cooldown.decay(before, 120) == pytest.approx(online.decay(before - 100, 20))


@pytest.mark.parametrize("profile", [Cooldown("20ba", "cosine"), Cooldown("20ba", floor=0.1), Window("3ba")])
def test_a_profile_that_one_buffer_cannot_follow_names_what_can(profile) -> None:
    with pytest.raises(ProfileError, match="record the run and take this average from the record"):
        EMA(profile=profile)


def test_a_linear_cooldown_is_a_window() -> None:
    for before in range(21):
        assert Cooldown("7ba").decay(before, 20) == pytest.approx(Window("7ba").decay(before, 20))


def test_a_cooldown_is_read_from_the_words_of_a_command_line() -> None:
    assert parse("cooldown", "20%, 1-sqrt") == Cooldown("0.2dur", "1-sqrt")
    assert parse("cooldown", "20%, 1-sqrt, floor 0.1, snap") == Cooldown("0.2dur", "1-sqrt", floor=0.1, snap=True)
    assert parse_words("cooldown 20%, snap, floor 0.1") == Cooldown("0.2dur", floor=0.1, snap=True)
    assert parse_words("unbiased 500ba") == HalfLife("500ba", unbiased=True)
    assert Cooldown("5ba", floor=0.25, snap=True).describe() == "cooldown 5ba, linear, floor 0.25, snap"
    assert parse("cooldown", "3ep") == Cooldown("3ep", "linear")
    assert Cooldown("0.5ep", "cosine").describe() == "cooldown 0.5ep, cosine"
    assert repr(Cooldown("5ba", cubic)) == "Cooldown(span=Time(5, 'ba'), shape=cubic)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Smoothing(1.5), "smoothing must be in"),
        (lambda: Smoothing(-0.5), "smoothing must be in"),
        (lambda: Smoothing(math.nan), "smoothing must be in"),
        (lambda: HalfLife(Time(-1, "ba")), "half-life must be at least 0"),
        (lambda: HalfLife("10"), "a time string is"),
        (lambda: Uniform("-1ba"), "a time string is"),
        (lambda: Window("0ba"), "window must be above 0"),
        (lambda: Cooldown("0ba"), "cooldown must be above 0"),
        (lambda: Cooldown("9ba", "sqrt"), "shape must be one of linear, 1-sqrt, cosine, 1-square, or a function"),
        (lambda: Cooldown("9ba", 0.1), "shape must be one of linear"),
        (lambda: Cooldown("9ba", floor=1.0), "floor must be a number from 0 to below 1"),
        (lambda: Cooldown("9ba", floor=-0.1), "floor must be a number from 0 to below 1"),
        (lambda: Cooldown("9ba", floor=math.nan), "floor must be a number from 0 to below 1"),
        (lambda: Cooldown("9ba", floor=True), "floor must be a number from 0 to below 1"),
        (lambda: Cooldown("9ba", snap="20%"), "snap must be True or False"),
        (lambda: parse_words("cooldown"), "a profile in words must be a name and a value"),
        (lambda: parse_words("cool 20%"), "a profile in words must be a name and a value"),
        (lambda: parse_words("cooldown 20%, floor"), "a cooldown must have numbers"),
        (lambda: parse_words("cooldown twenty%"), "a cooldown must have numbers"),
        (lambda: parse_words("cooldown 20%, linear, cosine"), "at most .got 'cosine'"),
        (lambda: parse_words("cooldown 20%, 1-cbrt"), "shape must be one of linear"),
        (lambda: Momentum(1.2), "first must be a number from 0 to 1"),
        (lambda: Momentum(0.99, 0.9), "a momentum must rise"),
        (lambda: Momentum(True), "first must be a number"),
        (lambda: Momentum(shape="step"), "shape must be one of cosine, linear"),
        (lambda: Momentum(over="1e6tok"), "over must be a finite number of steps, epochs or dur"),
        (lambda: Momentum(over="infba"), "over must be a finite number"),
        (lambda: Momentum(over="0ep"), "over must be above 0"),
        (lambda: Momentum().decay(0, 1), "a momentum must know how many steps 1.0dur are"),
        (lambda: Cooldown("9ba", lambda x: x), "shape must be a function that falls from 1 at 0 to 0 at 1"),
        (lambda: Cooldown("9ba", lambda x: 2 - x), "shape must be a function that falls from 1 at 0 to 0 at 1"),
        (PowerFunction, "exactly one of sigma_rel, gamma and half_life_fraction"),
        (lambda: PowerFunction(0.1, 1.0), "exactly one of sigma_rel, gamma and half_life_fraction"),
        (lambda: PowerFunction(sigma_rel=0.3), "sigma_rel must be above 0 and at most"),
        (lambda: PowerFunction(sigma_rel=math.nan), "sigma_rel must be above 0 and at most"),
        (lambda: PowerFunction(gamma=-1.0), "gamma must be above -1"),
        (lambda: PowerFunction(gamma=1.0, unit="days"), "unit must be one of"),
        (lambda: Warmup(Uniform()), "a warm-up needs"),
        (lambda: Warmup(HalfLife("1ba", unbiased=True)), "a warm-up needs"),
        (lambda: Warmup(Smoothing(0.9), power=0.0), "power must be above 0"),
        (lambda: Warmup(Smoothing(0.9), power=1.0, inv_gamma=-1.0), "inv_gamma must be above 0"),
    ],
)
def test_an_argument_out_of_range_is_a_clear_error(make, message) -> None:
    with pytest.raises((ProfileError, TimeError), match=message):
        make()


def test_a_profile_has_the_unit_of_its_clock() -> None:
    assert HalfLife("1ep").unit == "ep"
    assert Smoothing(0.9).unit is None
    assert Warmup(Smoothing(0.9)).unit is None
    assert PowerFunction(gamma=1.0, unit="sp").unit == "sp"


@pytest.mark.parametrize("form", forms().values(), ids=list(forms()))
def test_each_form_in_the_registry_parses_its_example(form) -> None:
    profile = parse(form.name, form.example)
    assert isinstance(profile, NamedProfile)
    assert form.example in profile.describe()
    assert not hasattr(profile, "__dict__")
    assert all((form.metavar, form.help))


@pytest.mark.parametrize("profile", PROFILES, ids=repr)
def test_the_options_of_a_profile_parse_to_the_same_profile(profile) -> None:
    if profile.options is None:
        own_function = isinstance(profile, Cooldown) and callable(profile.shape)
        assert own_function or isinstance(profile, (Warmup, Momentum)) or profile.sigma_rel is None
        return
    option, value, *unbiased = profile.options.split()
    again = parse(option.removeprefix("--"), value)
    assert (again.debiased() if unbiased else again) == profile


def test_the_options_of_the_registry_are_the_first_forms_of_the_classes() -> None:
    names = [form.name for form in options()]
    assert names[:5] == ["half-life", "window", "uniform-from", "power", "smoothing"]
    assert "unbiased" not in names
    assert {*names, "unbiased"} <= forms().keys()


@pytest.mark.parametrize("profile", PROFILES, ids=repr)
@pytest.mark.parametrize("moment", [0.0, 1.0, 7.5])
def test_the_decay_of_a_constant_profile_does_not_depend_on_the_start(profile, moment) -> None:
    if profile.constant:
        assert profile.decay(moment, moment + 3) == pytest.approx(profile.decay(0, 3), rel=1e-12)


def test_only_a_half_life_has_a_half_life_and_an_unbiased_variant() -> None:
    for profile in PROFILES:
        assert (profile.half_life is not None) == (profile.debiased() is not None) == isinstance(profile, HalfLife)
    assert HalfLife("infba").forgets_nothing
    assert not HalfLife("10ba").forgets_nothing
    assert HalfLife("10ba").argument == "half_life='10ba'"
    assert Uniform().argument == "profile=Uniform(since=Time(0, 'ba'))"


class Flat:
    """A custom profile with the three members of ``Profile`` only."""

    unit, recursive = None, True

    def decay(self, before: float, now: float) -> float:
        return 1.0 if now == before else before / now

    def __repr__(self) -> str:
        return "Flat()"


def test_a_custom_profile_needs_three_members_only() -> None:
    profile: Profile = Flat()
    words = named(profile)
    assert (words.unit, words.recursive, words.decay(1, 2)) == (None, True, 0.5)
    assert (words.describe(), words.argument, words.options) == ("Flat()", "profile=Flat()", None)
    assert (words.half_life, words.constant, words.forgets_nothing, words.debiased()) == (None, False, False, None)
    assert named(HalfLife("1ba")) == HalfLife("1ba")
    ema = EMA(profile=profile)
    assert ema.profile is profile
    assert ema.half_life is None
    assert ema.smoothing is None
