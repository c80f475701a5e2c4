"""Greedy tokens are those of transformers' own generate, whatever the schedule."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import Family, random_model, tiny_config
from serving import COMPUTE, LONGEST, MOVE, PROMPTS, Bound, ask, bound, bound_model, run

from outsize.asked import ServeRequest
from outsize.errors import ModelError, OptionError, RunError
from outsize.model.units import find_units
from outsize.planner.serving import plan_serving
from outsize.serve.attention import context_limit, use_paged_attention
from outsize.serve.schedule import POLICIES

FAMILIES = ["llama", "qwen3", "gemma3", "gemma2", "gpt2", "mixtral", "phi3"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Iterator[Bound]:
    with bound(request.param) as found:
        yield found


@pytest.fixture(scope="module")
def several() -> Iterator[list[Bound]]:
    """One whose layers stream, one with windows and soft caps, one with experts."""
    with bound("llama", streamed=True) as one, bound("gemma2") as two, bound("mixtral") as three:
        yield [one, two, three]


@pytest.mark.parametrize("pages, seats, step_tokens", [(200, 8, 512), (6, 3, 7), (8, 8, 8)])
def test_tokens_are_those_of_transformers(family: Bound, pages: int, seats: int, step_tokens: int) -> None:
    with family.engine(pages, seats, step_tokens) as engine:
        heard = [ask(engine, prompt, max_new_tokens=LONGEST)[1] for prompt in PROMPTS]
        run(engine)
        assert [one.tokens() for one in heard] == family.answers
        assert engine.pages.available == pages
        assert pages == 200 or engine.scheduler.preemptions > 0


@given(data=st.data())
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_schedule_changes_a_token(several: list[Bound], data: st.DataObject) -> None:
    model = data.draw(st.sampled_from(several), "model")
    seats, pages = data.draw(st.integers(1, 6), "seats"), data.draw(st.integers(6, 24), "pages")
    step_tokens, policy = data.draw(st.integers(seats, 40), "step tokens"), data.draw(st.sampled_from(sorted(POLICIES)))
    far = data.draw(st.sampled_from([0, 3, 40]), "far pages")
    seconds = data.draw(st.sampled_from([MOVE, COMPUTE]), "seconds")
    with model.engine(pages, seats, step_tokens, policy, far, seconds) as engine:
        engine.scheduler.sharing = data.draw(st.booleans(), "sharing")
        asked = []
        for _ in range(data.draw(st.integers(1, 10), "requests")):
            number, new = data.draw(st.integers(0, len(PROMPTS) - 1)), data.draw(st.integers(1, LONGEST))
            who = {"key": data.draw(st.sampled_from("ab")), "priority": data.draw(st.integers(0, 2))}
            n = data.draw(st.integers(1, 2))
            request, heard = ask(engine, PROMPTS[number], max_new_tokens=new, n=n, **who)
            asked.append((request, heard, model.answers[number][:new], n))
            for _ in range(data.draw(st.integers(0, 4), "steps between")):
                engine.step()
                engine.check()
            if data.draw(st.integers(0, 5)) == 0:
                engine.cancel(asked[data.draw(st.integers(0, len(asked) - 1))][0])
        run(engine)
        for request, heard, answer, n in asked:
            for index in range(n):
                if request.cancelled and heard.finished(index) != "length":
                    assert heard.tokens(index) == answer[: len(heard.tokens(index))]
                else:
                    assert heard.tokens(index) == answer and heard.finished(index) == "length"
        assert engine.pages.available == pages


def test_a_known_prefix_is_not_computed_again(family: Bound) -> None:
    with family.engine(200, 4, 64) as engine:
        first, _ = ask(engine, PROMPTS[2], max_new_tokens=4)
        run(engine)
        before = engine.scheduler.pages.available
        second, heard = ask(engine, PROMPTS[2], max_new_tokens=LONGEST)
        steps = run(engine)
        assert (first.cached_tokens, second.cached_tokens) == (0, 48)
        assert heard.tokens() == family.answers[2] and steps == LONGEST
        assert engine.pages.available == before


def test_a_long_prompt_holds_nobody_up(family: Bound) -> None:
    with family.engine(200, 4, 8) as engine:
        _, talking = ask(engine, PROMPTS[6], max_new_tokens=LONGEST)
        engine.step()
        ask(engine, PROMPTS[7], max_new_tokens=2)
        for said in range(2, 8):
            engine.step()
            assert len(talking.tokens()) == said


def test_completions_of_one_prompt_share_its_pages_until_they_differ(family: Bound) -> None:
    with family.engine(200, 8, 64) as engine:
        _, heard = ask(engine, PROMPTS[1], max_new_tokens=8, n=4, temperature=1.5, seed=3)
        engine.step()
        assert engine.pages.count - engine.pages.available == 3  # 40 tokens, 4 holders
        run(engine)
        answers = [heard.tokens(index) for index in range(4)]
        assert len({tuple(answer) for answer in answers}) > 1
        again = ask(engine, PROMPTS[1], max_new_tokens=8, n=4, temperature=1.5, seed=3)[1]
        ask(engine, PROMPTS[2], max_new_tokens=8)
        run(engine)
        assert [again.tokens(index) for index in range(4)] == answers, "a seed means the same draws in any company"


def test_cancelling_frees_pages_within_a_step(family: Bound) -> None:
    with family.engine(20, 4, 64) as engine:
        request, heard = ask(engine, PROMPTS[1], max_new_tokens=LONGEST)
        engine.step()
        assert engine.pages.available < 20
        engine.cancel(request)
        engine.step()
        assert engine.pages.available == 20 and heard.finished() == "cancelled" and engine.idle


def test_what_cannot_be_served_is_refused_by_name(family: Bound) -> None:
    from models import tiny_model

    with pytest.raises(ModelError, match="T5"):
        use_paged_attention(tiny_model("t5", tied=True))
    with family.engine(6, 2, 8) as engine:
        with pytest.raises(OptionError, match="96 tokens of context"):
            ask(engine, [1] * 90, max_new_tokens=7)
        with pytest.raises(OptionError, match="no tokens"):
            ask(engine, [], max_new_tokens=7)
        with pytest.raises(OptionError, match="top_p is 1.5"):
            ask(engine, [1], top_p=1.5)
    with pytest.raises(ModelError, match="only its engine"), torch.no_grad():
        family.model(input_ids=torch.tensor([[1]]))


@pytest.mark.parametrize("family, kind", [("phi3", "longrope"), ("llama", "dynamic")])
def test_rotary_embeddings_that_change_with_length_are_served_below_that(family: Family, kind: str) -> None:
    config = tiny_config(family, False, 3, 64, 256)
    factors = {"short_factor": [1.1] * 8, "long_factor": [3.0] * 8} if kind == "longrope" else {}
    config.rope_parameters = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0, **factors}
    config.max_position_embeddings = 384 if factors else 96
    config.original_max_position_embeddings = 96
    with bound_model(lambda: random_model(config).eval()) as model:
        assert context_limit(model.model)[0] == 96
        with model.engine(20, 4, 32) as engine:
            heard = [ask(engine, prompt, max_new_tokens=LONGEST)[1] for prompt in PROMPTS]
            run(engine)
            assert [one.tokens() for one in heard] == model.answers
    fresh = random_model(config).eval()
    use_paged_attention(fresh)
    with pytest.raises(OptionError, match=f"{kind} rotary embeddings.*up to 96 tokens, not to 97"):
        plan_serving(fresh, find_units(fresh), ServeRequest(1 << 30, 97), 0, 1 << 30)


def test_one_request_of_no_numbers_is_no_concern_of_the_others(family: Bound) -> None:
    """What NaN leaves behind in pages, and in a step's logits, reaches nobody else."""
    weights = family.model.get_input_embeddings().weight
    said = {token for words in (*PROMPTS, *family.answers) for token in words}
    bad = next(token for token in range(3, 256) if token not in said)
    kept = weights[bad].clone()
    with torch.no_grad():
        weights[bad] = float("nan")
    try:
        with family.engine(12, 4, 64) as engine:
            for options in ({}, {"temperature": 1.0, "seed": 1}):
                lost = [ask(engine, [bad] * 40, max_new_tokens=8, **options)[1] for _ in range(2)]
                well = ask(engine, PROMPTS[6], max_new_tokens=LONGEST)[1]
                run(engine)
                assert [one.finished() for one in lost] == ["error", "error"] and not lost[0].tokens()
                assert isinstance(lost[0].events[-1].error, RunError) and well.tokens() == family.answers[6]
                again = [ask(engine, prompt, max_new_tokens=LONGEST)[1] for prompt in PROMPTS]
                run(engine)
                assert [one.tokens() for one in again] == family.answers
    finally:
        with torch.no_grad():
            weights[bad] = kept
