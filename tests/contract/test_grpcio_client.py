"""The wire as clients of its name know it: a stock grpcio client against real servers, rule by rule."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from tokenizers import Tokenizer

from runtime.models import SEEDLING, find_model
from tests.contract.loops import MOST_S
from tests.contract.servers import ServerProcess, started
from tests.contract.stubs import ENDLESS, PROMPT, Stock, Stubs, digest_of, kinds_of, refused, stock, tokens_of

pytestmark = pytest.mark.door

Code = grpc.StatusCode
SINK, WINDOW = 4, 28
VISIBLE = SINK + WINDOW
LONG = [3 + (7 * place) % 2000 for place in range(VISIBLE + 8)]


@pytest.fixture
def client(stubs: Stubs, plain: ServerProcess) -> Iterator[Stock]:
    with stock(stubs, plain.grpc) as client:
        yield client


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def small_server(state: Path) -> Iterator[ServerProcess]:
    with started("perennial", sink=SINK, window=WINDOW, capacity=2, state_dir=state) as server:
        yield server


@pytest.fixture
def small(stubs: Stubs, small_server: ServerProcess) -> Iterator[Stock]:
    """A client of a server with a small window, two slabs and a directory."""
    with stock(stubs, small_server.grpc) as client:
        yield client


@pytest.fixture(scope="module")
def guarded() -> Iterator[ServerProcess]:
    """A server with keys, one slab and little patience."""
    with started("perennial", api_keys="first,second", capacity=1, idle_ttl_s=6) as server:
        yield server


def test_every_kind_of_server_serves_a_session_from_its_making_to_its_close(
    stubs: Stubs, server: ServerProcess
) -> None:
    with stock(stubs, server.grpc) as client:
        session_id = client.create(client_label="smoke")
        appended = client.append(session_id, PROMPT)
        frames = list(client.stream(session_id, 5))
        info = client.info(session_id)

        assert appended.history_length == len(PROMPT)
        assert kinds_of(frames) == ["token_id"] * 5 + ["done"]
        assert info.history_digest == digest_of(PROMPT + tokens_of(frames))
        assert client.close(session_id) == len(PROMPT) + 5


# Sessions and histories.


def test_session_ids_are_long_and_never_the_same(client: Stock) -> None:
    ids = {client.create() for _ in range(20)}

    assert len(ids) == 20
    # 128 random bits in an alphabet of 64 letters.
    assert min(map(len, ids)) >= 22


def test_the_digest_is_blake2b_of_the_token_ids_as_little_endian_uint32(client: Stock) -> None:
    session_id = client.create()

    empty = client.append(session_id, [])
    some = client.append(session_id, [5, 300, 2047])

    assert (empty.history_length, empty.history_digest) == (0, digest_of([]))
    assert (some.history_length, some.history_digest) == (3, digest_of([5, 300, 2047]))
    assert client.info(session_id).history_digest == some.history_digest


def test_an_empty_append_is_legal_and_changes_no_history(client: Stock) -> None:
    session_id = client.create(PROMPT)

    appended = client.append(session_id, [])

    assert (appended.history_length, appended.history_digest) == (len(PROMPT), digest_of(PROMPT))


def test_info_says_what_the_session_holds_and_can_ever_hold(small: Stock) -> None:
    session_id = small.create(LONG)

    info = small.info(session_id)

    assert (info.sink, info.window) == (SINK, WINDOW)
    assert (info.history_length, info.evicted_token_count) == (len(LONG), 8)
    assert 0 < info.kv_live_bytes <= info.kv_ceiling_bytes
    assert (info.cache_invariant_inv1_violations, info.cache_invariant_inv2_violations) == (0, 0)
    assert info.idle_seconds >= 0


def test_an_id_outside_the_vocabulary_is_refused_and_the_history_stays(client: Stock) -> None:
    session_id = client.create(PROMPT)

    for stranger in (2048, 2**32 - 1):
        with refused(Code.INVALID_ARGUMENT):
            client.append(session_id, [5, stranger, 6])

    assert client.info(session_id).history_digest == digest_of(PROMPT)


def test_an_append_to_a_history_of_another_length_is_aborted_and_names_the_length(client: Stock) -> None:
    session_id = client.create(PROMPT)

    # The 0 is a 0 and not an absent one.
    for expected in (0, len(PROMPT) - 1, len(PROMPT) + 1):
        with refused(Code.ABORTED) as words:
            client.append(session_id, [5], expected_history_length=expected)
        assert f"history_length is {len(PROMPT)}" in words[0]

    assert client.info(session_id).history_digest == digest_of(PROMPT)


def test_a_retry_of_an_append_whose_reply_was_lost_does_not_append_twice(client: Stock) -> None:
    session_id = client.create()
    sent = client.append(session_id, PROMPT, expected_history_length=0)

    with refused(Code.ABORTED) as words:
        client.append(session_id, PROMPT, expected_history_length=0)

    assert f"history_length is {len(PROMPT)}" in words[0]
    assert client.info(session_id).history_digest == sent.history_digest


def test_an_overflow_that_is_none_is_refused(client: Stock) -> None:
    for overflow in (2, -1, -2):
        with refused(Code.INVALID_ARGUMENT):
            client.call("CreateSession", overflow=overflow)


# Generating.


def test_a_generation_is_tokens_and_one_done(client: Stock) -> None:
    frames = list(client.stream(client.create(PROMPT), 7))

    done = frames[-1].done
    assert kinds_of(frames) == ["token_id"] * 7 + ["done"]
    assert done.stop_reason == done.STOP_REASON_MAX_TOKENS
    assert done.generated_token_count == 7
    assert 0 <= done.prefill_duration_seconds <= done.total_duration_seconds


def test_an_eos_ends_a_generation_and_joins_the_history(client: Stock) -> None:
    told = client.generated(client.create(PROMPT), 10)
    session_id = client.create(PROMPT, eos_token_ids=[told[4]])

    frames = list(client.stream(session_id, 10))

    upto = told[: told.index(told[4]) + 1]
    assert tokens_of(frames) == upto
    assert frames[-1].done.stop_reason == frames[-1].done.STOP_REASON_EOS
    assert client.info(session_id).history_digest == digest_of(PROMPT + upto)


def test_a_temperature_absent_and_a_temperature_of_zero_are_both_greedy(client: Stock) -> None:
    absent = client.generated(client.create(PROMPT), 20)
    zero = client.generated(client.create(PROMPT), 20, temperature=0.0)
    seeded = client.generated(client.create(PROMPT), 20, seed=9, top_p=0.5, top_k=3)
    one_left = client.generated(client.create(PROMPT), 20, temperature=2.0, top_k=1)

    assert absent == zero == seeded == one_left


def test_a_seed_of_zero_is_a_seed(client: Stock) -> None:
    zero = [client.generated(client.create(PROMPT), 30, temperature=3.0, seed=0) for _ in range(2)]
    other = client.generated(client.create(PROMPT), 30, temperature=3.0, seed=1)

    assert zero[0] == zero[1] != other


def test_the_server_draws_a_seed_when_none_is_given(client: Stock) -> None:
    first, second = (client.generated(client.create(PROMPT), 30, temperature=3.0) for _ in range(2))

    assert first != second


def test_a_generation_cut_in_two_gives_the_tokens_of_a_whole_one(client: Stock) -> None:
    sampling = {"temperature": 1.0, "seed": 2**64 - 1}
    whole = client.generated(client.create(PROMPT), 20, **sampling)
    session_id = client.create(PROMPT)

    assert client.generated(session_id, 8, **sampling) + client.generated(session_id, 12, **sampling) == whole


@pytest.mark.parametrize(
    "sampling",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0, "temperature": 1.0},
        {"top_p": 1.5},
        {"top_p": float("nan")},
    ],
    ids=str,
)
def test_a_generation_that_makes_no_sense_is_refused_and_the_session_answers(
    client: Stock, sampling: dict[str, float]
) -> None:
    session_id = client.create(PROMPT)

    with refused(Code.INVALID_ARGUMENT) as words:
        list(client.call("Generate", session_id=session_id, **{"max_tokens": 5, **sampling}))

    assert next(iter(sampling)) in words[0]
    assert client.info(session_id).history_digest == digest_of(PROMPT)


def test_a_session_without_history_does_not_generate(client: Stock) -> None:
    session_id = client.create()

    with refused(Code.INVALID_ARGUMENT):
        list(client.stream(session_id, 5))

    assert client.append(session_id, PROMPT).history_length == len(PROMPT)


# Forgetting is never silent.


def test_a_generation_says_first_and_once_that_the_history_is_past_the_window(small: Stock) -> None:
    session_id = small.create()
    appended = small.append(session_id, LONG)

    frames = list(small.stream(session_id, 12))

    assert appended.evicted_token_count == 8
    assert kinds_of(frames) == ["truncated"] + ["token_id"] * 12 + ["done"]
    assert frames[0].truncated.dropped_token_count == 8
    assert small.info(session_id).evicted_token_count == 20


def test_a_generation_that_comes_to_the_end_of_the_window_leaves_the_word_to_the_next(small: Stock) -> None:
    session_id = small.create(LONG[: VISIBLE - 2])

    assert kinds_of(list(small.stream(session_id, 10))) == ["token_id"] * 10 + ["done"]
    later = list(small.stream(session_id, 1))

    assert kinds_of(later) == ["truncated", "token_id", "done"]
    assert later[0].truncated.dropped_token_count == 8


def test_a_session_that_must_not_forget_refuses_what_it_cannot_hold_and_appends_nothing(small: Stock) -> None:
    session_id = small.create(LONG[: VISIBLE - 2], overflow=small.messages.ERROR)

    with refused(Code.OUT_OF_RANGE):
        small.append(session_id, LONG[:3])

    assert small.info(session_id).history_digest == digest_of(LONG[: VISIBLE - 2])
    assert small.append(session_id, LONG[:2]).evicted_token_count == 0


def test_a_session_that_must_not_forget_stops_where_its_slab_is_full(small: Stock) -> None:
    session_id = small.create(LONG[: VISIBLE - 2], overflow=small.messages.ERROR)

    frames = list(small.stream(session_id, 10))
    full = list(small.stream(session_id, 10))

    assert kinds_of(frames) == ["token_id", "token_id", "done"]
    assert frames[-1].done.stop_reason == frames[-1].done.STOP_REASON_TRUNCATED
    assert kinds_of(full) == ["done"]
    assert full[0].done.stop_reason == frames[-1].done.STOP_REASON_TRUNCATED
    assert small.info(session_id).evicted_token_count == 0


# Sessions that are not there, and slabs that are not free.


def test_a_session_unknown_closed_or_evicted_is_not_found_in_the_same_words(
    stubs: Stubs, guarded: ServerProcess
) -> None:
    with stock(stubs, guarded.grpc, "first") as client:
        pushed_out, idle = client.create(), client.create()
        with refused(Code.NOT_FOUND) as words_of_the_idle:
            while client.info(idle).history_length == 0:
                pass
        closed = client.create()
        client.close(closed)

        told = set(words_of_the_idle)
        for session_id in (pushed_out, idle, closed, "nobody", ""):
            for method in ("AppendTokens", "Generate", "CloseSession", "GetSessionInfo", "ForkSession"):
                with refused(Code.NOT_FOUND) as words:
                    answer = client.call(method, session_id=session_id)
                    if method == "Generate":
                        next(answer)
                told.update(words)

    assert len(told) == 1


def test_a_call_that_waited_for_a_close_is_told_the_same_as_one_that_came_later(client: Stock) -> None:
    session_id = client.create(PROMPT)
    running = client.stream(session_id, 100)
    next(running)
    closing = client.begin("CloseSession", session_id=session_id)
    waiting = client.begin("AppendTokens", session_id=session_id, token_ids=[5])

    assert closing.result().final_history_length in (len(PROMPT) + 100, len(PROMPT) + 101)
    with refused(Code.NOT_FOUND) as words_of_the_waiting:
        waiting.result()
    with refused(Code.NOT_FOUND) as words_of_the_late:
        client.info(session_id)

    assert words_of_the_waiting == words_of_the_late
    assert kinds_of(list(running))[-1] == "done"


@pytest.mark.parametrize("has_directory", [False, True])
def test_the_session_idle_longest_gives_way_to_a_new_one_and_a_working_one_never(
    stubs: Stubs, tmp_path: Path, has_directory: bool
) -> None:
    state_dir = tmp_path if has_directory else ""
    with (
        started("perennial", sink=SINK, window=WINDOW, capacity=2, state_dir=state_dir) as server,
        stock(stubs, server.grpc) as client,
    ):
        working = client.create(PROMPT)
        idle = client.create(PROMPT)
        running = client.stream(working, ENDLESS)
        next(running)
        client.append(idle, [5])

        newer = client.create()

        assert client.info(newer).history_length == 0
        if has_directory:
            assert client.info(idle).history_length == len(PROMPT) + 1
        else:
            with refused(Code.NOT_FOUND):
                client.info(idle)
        assert kinds_of([next(running)]) == ["token_id"]
        running.cancel()
        assert client.info(working).history_length > len(PROMPT)


def test_a_new_session_is_refused_while_every_slab_is_at_work(small: Stock) -> None:
    ids = [small.create(PROMPT) for _ in range(2)]
    running = [small.stream(session_id, ENDLESS) for session_id in ids]
    for stream in running:
        next(stream)

    with refused(Code.RESOURCE_EXHAUSTED):
        small.create()
    with refused(Code.RESOURCE_EXHAUSTED):
        small.call("ForkSession", session_id=ids[0])

    for stream, session_id in zip(running, ids, strict=True):
        stream.cancel()
        small.info(session_id)
    assert small.create()


# One session, two calls; and clients that leave.


def test_two_generations_on_one_session_come_one_after_the_other(client: Stock) -> None:
    whole = client.generated(client.create(PROMPT), 60)
    session_id = client.create(PROMPT)

    first = client.stream(session_id, 40)
    begun = [next(first)]
    second = list(client.stream(session_id, 20))

    assert tokens_of(begun + list(first)) == whole[:40]
    assert tokens_of(second) == whole[40:]


def test_an_append_waits_for_the_generation_that_runs(client: Stock) -> None:
    session_id = client.create(PROMPT)
    running = client.stream(session_id, 100)
    begun = [next(running)]

    appended = client.append(session_id, [5, 6])

    told = tokens_of(begun + list(running))
    assert appended.history_length == len(PROMPT) + 102
    assert appended.history_digest == digest_of([*PROMPT, *told, 5, 6])


def test_a_close_waits_for_the_generation_that_runs(client: Stock) -> None:
    session_id = client.create(PROMPT)
    running = client.stream(session_id, 100)
    next(running)

    assert client.close(session_id) == len(PROMPT) + 100
    assert kinds_of(list(running)) == ["token_id"] * 99 + ["done"]


def test_a_session_answers_after_a_client_has_cancelled_a_stream(client: Stock) -> None:
    session_id = client.create(PROMPT)
    running = client.stream(session_id, ENDLESS)
    seen = tokens_of([next(running) for _ in range(3)])

    running.cancel()
    info = client.info(session_id)
    more = client.generated(session_id, 5)

    generated = info.history_length - len(PROMPT)
    whole = client.generated(client.create(PROMPT), generated + 5)
    assert generated >= 3
    assert whole[:3] == seen
    assert whole[generated:] == more
    assert info.history_digest == digest_of(PROMPT + whole[:generated])


def test_a_deadline_of_the_client_ends_its_stream_and_the_session_answers(client: Stock) -> None:
    session_id = client.create(PROMPT)

    with refused(Code.DEADLINE_EXCEEDED):
        list(client.stream(session_id, ENDLESS, timeout=0.5))

    info = client.info(session_id)
    assert len(PROMPT) <= info.history_length < ENDLESS
    assert tokens_of(list(client.stream(session_id, 1)))


def test_a_session_answers_to_another_connection_after_one_was_lost(stubs: Stubs, plain: ServerProcess) -> None:
    # Channels with the same arguments share a connection; these do not.
    with stock(stubs, plain.grpc, options=[("grpc.use_local_subchannel_pool", 1)]) as leaves:
        session_id = leaves.create(PROMPT)
        next(leaves.stream(session_id, ENDLESS))
    with stock(stubs, plain.grpc) as stays:
        assert stays.info(session_id).history_length >= len(PROMPT)
        assert stays.generated(session_id, 1)


# Forks, snapshots, lists.


def test_a_fork_goes_on_with_the_tokens_of_the_original(small: Stock) -> None:
    session_id = small.create(LONG)
    small.generated(session_id, 3)

    fork_id = small.call("ForkSession", session_id=session_id).session_id

    assert fork_id != session_id
    assert small.info(fork_id).history_digest == small.info(session_id).history_digest
    sampling = {"temperature": 1.0, "seed": 3}
    assert small.generated(fork_id, 10, **sampling) == small.generated(session_id, 10, **sampling)


def test_a_restored_session_goes_on_with_the_tokens_of_the_saved_one(small: Stock) -> None:
    session_id = small.create(LONG)
    saved = small.call("SaveSession", session_id=session_id)
    expected = small.generated(session_id, 10, temperature=1.0, seed=3)

    restored = small.call("RestoreSession", snapshot_id=saved.snapshot_id).session_id

    assert saved.history_length == len(LONG)
    assert saved.size_bytes > 0
    assert small.info(restored).history_digest == digest_of(LONG)
    assert small.generated(restored, 10, temperature=1.0, seed=3) == expected


def test_a_snapshot_that_is_not_there_is_not_found(small: Stock) -> None:
    for snapshot_id in ("nothing", "", "..", "../sessions/x"):
        with refused(Code.NOT_FOUND):
            small.call("RestoreSession", snapshot_id=snapshot_id)


def test_a_snapshot_goes_on_under_another_window_by_reading_its_history_again(
    stubs: Stubs, small: Stock, state: Path, tmp_path: Path
) -> None:
    saved = small.call("SaveSession", session_id=small.create(LONG))
    shutil.copytree(state / "snapshots", tmp_path / "snapshots")

    with (
        started("perennial", sink=SINK, window=WINDOW + 1, state_dir=tmp_path) as server,
        stock(stubs, server.grpc) as other,
    ):
        restored = other.call("RestoreSession", snapshot_id=saved.snapshot_id).session_id
        fresh = other.create(LONG)

        assert other.info(restored).history_digest == digest_of(LONG)
        assert other.generated(restored, 8) == other.generated(fresh, 8)


def test_snapshots_are_listed_and_deleted(small: Stock) -> None:
    saved = small.call("SaveSession", session_id=small.create(LONG, client_label="to be deleted"))

    listed = {one.snapshot_id: one for one in small.call("ListSnapshots").snapshots}

    mine = listed[saved.snapshot_id]
    assert (mine.client_label, mine.history_length) == ("to be deleted", len(LONG))
    assert mine.size_bytes == saved.size_bytes
    assert small.call("DeleteSnapshot", snapshot_id=saved.snapshot_id).freed_bytes == saved.size_bytes
    assert saved.snapshot_id not in {one.snapshot_id for one in small.call("ListSnapshots").snapshots}
    with refused(Code.NOT_FOUND):
        small.call("DeleteSnapshot", snapshot_id=saved.snapshot_id)


def test_a_server_without_a_directory_neither_saves_nor_restores(client: Stock) -> None:
    with refused(Code.FAILED_PRECONDITION):
        client.call("SaveSession", session_id=client.create(PROMPT))
    with refused(Code.FAILED_PRECONDITION):
        client.call("RestoreSession", snapshot_id="any")


def test_a_list_tells_of_sessions_and_not_their_ids(small: Stock) -> None:
    session_id = small.create(LONG, client_label="listed")

    told = small.call("ListSessions")

    mine = next(one for one in told.sessions if one.client_label == "listed")
    assert (mine.history_length, mine.evicted_token_count) == (len(LONG), 8)
    assert mine.kv_live_bytes > 0
    assert session_id.encode() not in told.SerializeToString()
    small.close(session_id)
    assert "listed" not in [one.client_label for one in small.call("ListSessions").sessions]


def test_the_model_is_told_to_who_makes_tokens_for_it(client: Stock) -> None:
    told = client.call("GetModelInfo")

    tokenizer = Tokenizer.from_file(str(find_model(SEEDLING) / "tokenizer.json"))
    digest = hashlib.blake2b()
    for token_id in range(tokenizer.get_vocab_size()):
        spelt = (tokenizer.id_to_token(token_id) or "").encode()
        digest.update(token_id.to_bytes(4, "little") + len(spelt).to_bytes(4, "little") + spelt)
    assert (told.model, told.vocabulary, list(told.eos_token_ids)) == (SEEDLING, 2048, [2])
    assert told.tokenizer_digest == digest.digest()


# Keys, and calls that no client of ours would make.


def test_a_call_without_a_key_or_with_a_wrong_one_is_unauthenticated(stubs: Stubs, guarded: ServerProcess) -> None:
    for key in ("", "wrong", "first,second", "firs", "first second"):
        with stock(stubs, guarded.grpc, key) as client, refused(Code.UNAUTHENTICATED):
            client.call("ListSessions")
        with stock(stubs, guarded.grpc, key) as client, refused(Code.UNAUTHENTICATED):
            next(client.stream("nobody", 1))


def test_each_of_the_keys_opens_the_door(stubs: Stubs, guarded: ServerProcess) -> None:
    for key in ("first", "second"):
        with stock(stubs, guarded.grpc, key) as client:
            client.call("ListSessions")


def test_a_method_that_is_not_there_is_unimplemented(client: Stock) -> None:
    for path in ("/kakeya.v1.RuntimeService/Nothing", "/kakeya.v2.RuntimeService/CreateSession"):
        with refused(Code.UNIMPLEMENTED):
            client.channel.unary_unary(path)(b"", timeout=MOST_S)


def test_bytes_that_are_no_message_are_an_invalid_argument(client: Stock) -> None:
    session_id = client.create(PROMPT)
    mine = client.messages.AppendTokensRequest(session_id=session_id).SerializeToString()
    append = client.channel.unary_unary("/kakeya.v1.RuntimeService/AppendTokens")
    for stranger in (b"\xff\xff", b"\x0a\x02\xff\xfe", mine + b"\x12\x05\x05\x05", b"\x0b", b"\x0d\x01"):
        with refused(Code.INVALID_ARGUMENT):
            append(stranger, timeout=MOST_S)

    assert client.info(session_id).history_digest == digest_of(PROMPT)


def test_fields_of_another_type_or_of_a_later_version_are_left_aside(client: Stock) -> None:
    session_id = client.create(PROMPT)
    asked = client.messages.GenerateRequest(session_id=session_id, max_tokens=3).SerializeToString()
    # max_tokens as a string, and field 100 as a varint.
    generate = client.channel.unary_stream("/kakeya.v1.RuntimeService/Generate")

    frames = list(generate(asked + b"\x12\x03abc" + b"\xa0\x06\x01", timeout=MOST_S))

    assert len(frames) == 4


# The last are more bytes than a stream's window holds.
@pytest.mark.parametrize("count", [10, 1000, 40_000])
def test_a_client_may_gzip_what_it_sends(stubs: Stubs, plain: ServerProcess, client: Stock, count: int) -> None:
    session_id = client.create()
    with stock(stubs, plain.grpc, compression=grpc.Compression.Gzip) as compressing:
        assert compressing.append(session_id, [2000] * count).history_length == count


def test_a_compression_that_is_unknown_is_unimplemented_and_the_server_lives(
    stubs: Stubs, plain: ServerProcess, client: Stock
) -> None:
    session_id = client.create()
    with (
        stock(stubs, plain.grpc, compression=grpc.Compression.Deflate) as compressing,
        refused(Code.UNIMPLEMENTED),
    ):
        compressing.append(session_id, [5] * 1000)

    assert client.append(session_id, PROMPT).history_length == len(PROMPT)


def test_an_append_of_64_mib_is_refused_and_the_server_lives(stubs: Stubs, plain: ServerProcess, client: Stock) -> None:
    session_id = client.create(PROMPT)
    whole = client.messages.AppendTokensRequest(session_id=session_id).SerializeToString()
    # One token id a byte, behind the field's number and a length of four septets and one.
    whole += b"\x12\x80\x80\x80\x20" + b"\x05" * 64 * 2**20
    options = [("grpc.max_send_message_length", -1)]
    with stock(stubs, plain.grpc, options=options) as generous, refused(Code.RESOURCE_EXHAUSTED):
        generous.channel.unary_unary("/kakeya.v1.RuntimeService/AppendTokens")(whole, timeout=MOST_S)

    assert client.append(session_id, [5]).history_length == len(PROMPT) + 1
