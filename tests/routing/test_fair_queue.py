"""Whose turn it is when replicas are scarce."""

from tera.routing.fair_queue import FairQueue


class Asked:
    def __init__(self, name: str) -> None:
        self.name = name
        self.wanted = True


def queue() -> FairQueue[Asked]:
    return FairQueue(lambda asked: asked.wanted)


def served(waiting: FairQueue[Asked], most: int = 1000) -> list[str]:
    names: list[str] = []
    while len(names) < most and (asked := waiting.first()) is not None:
        waiting.pop()
        names.append(asked.name)
    return names


def test_b4_one_tenants_flood_does_not_keep_another_waiting() -> None:
    waiting = queue()
    for _ in range(100):
        waiting.push("flood", 100, Asked("flood"))
    waiting.push("quiet", 100, Asked("quiet"))
    assert served(waiting).index("quiet") <= 1


def test_tenants_share_by_tokens_and_not_by_requests() -> None:
    waiting = queue()
    for _ in range(100):
        waiting.push("short", 100, Asked("short"))
        waiting.push("long", 1000, Asked("long"))
    first = served(waiting, 55)
    assert 49 <= first.count("short") <= 51
    assert 4 <= first.count("long") <= 6


def test_a_tenants_own_requests_keep_their_order() -> None:
    waiting = queue()
    for number in range(20):
        waiting.push("tenant", 10, Asked(str(number)))
    assert served(waiting) == [str(number) for number in range(20)]


def test_who_does_not_wait_any_more_is_passed_over() -> None:
    waiting = queue()
    gone, here = Asked("gone"), Asked("here")
    waiting.push("a", 1, gone)
    waiting.push("b", 1, here)
    gone.wanted = False
    assert waiting.first() is here
    assert served(waiting) == ["here"]
    assert waiting.first() is None


def test_who_had_its_turn_in_vain_is_next() -> None:
    waiting = queue()
    for name in ("a", "b", "c"):
        waiting.push(name, 10, Asked(name))
    refused = waiting.first()
    waiting.pop()
    assert refused is not None
    waiting.push_front(refused)
    assert served(waiting) == ["a", "b", "c"]


def test_who_was_idle_is_owed_nothing_for_that_time() -> None:
    waiting = queue()
    for _ in range(50):
        waiting.push("steady", 10, Asked("steady"))
    served(waiting, 40)
    for _ in range(50):
        waiting.push("back", 10, Asked("back"))
    assert 9 <= served(waiting, 20).count("back") <= 11


def giving_up(waiting: FairQueue[Asked]) -> list[Asked]:
    """Have another tenant wait, and then one with many that will give up; return these."""
    for _ in range(3):
        waiting.push("other", 10, Asked("other"))
    given_up = [Asked("given up") for _ in range(99)]
    for asked in given_up:
        waiting.push("tenant", 10, asked)
    return given_up


def test_b4_who_gives_up_moves_its_tenant_behind_nobody() -> None:
    waiting = queue()
    for asked in giving_up(waiting):
        waiting.remove("tenant", asked)
    waiting.push("tenant", 10, Asked("tenant"))
    assert served(waiting) == ["other", "tenant", "other", "other"]


def test_b4_who_is_passed_over_moves_its_tenant_behind_nobody() -> None:
    waiting = queue()
    for asked in giving_up(waiting):
        asked.wanted = False
    waiting.push("tenant", 10, Asked("tenant"))
    assert served(waiting) == ["other", "tenant", "other", "other"]


def test_who_gives_up_before_its_tenants_others_lets_them_move_up() -> None:
    waiting = queue()
    first, second = Asked("first"), Asked("second")
    waiting.push("tenant", 1000, first)
    waiting.push("tenant", 10, second)
    for _ in range(5):
        waiting.push("other", 100, Asked("other"))
    waiting.remove("tenant", first)
    assert served(waiting, 1) == ["second"]


def test_x1_nothing_is_kept_of_who_gave_up_while_others_wait() -> None:
    waiting = queue()
    waiting.push("other", 10, Asked("other"))
    for number in range(1000):
        asked = Asked(str(number))
        waiting.push(f"tenant{number}", 10, asked)
        waiting.remove(f"tenant{number}", asked)
    refused = Asked("refused")
    waiting.push_front(refused)
    waiting.remove("tenant", refused)
    assert len(waiting) == 1
    waiting.push("other", 10, Asked("other"))
    assert served(waiting, 1) == ["other"]
    assert list(waiting._lines) == ["other"]
