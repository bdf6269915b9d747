"""Kinds of worlds: `any` lets the seed choose, the others look for trouble of one sort."""

from dataclasses import replace

from tests.simulation.network import Weather
from tests.simulation.pools import ADDRESSES, INTEGERS, SPACES
from tests.simulation.world import ANY, Application, BesideGo, Profile

KINDS = (INTEGERS, ADDRESSES, SPACES)

PARTITIONS = Profile(
    "partitions",
    faults={"cut_pod": 4, "freeze_pod": 3, "kill_pod": 1},
    weather=Weather(slow=6.0, slowness=0.0005, loss=0.1),
    paces=(4.0,),
    pods=(4,),
    kinds=KINDS,
)
LEADERS = Profile(
    "leaders",
    faults={"cut_pod": 3, "kill_agent": 2, "freeze_agent": 3, "cut_agent": 2, "cut_agent_from_database": 2},
    doubt=0.15,
    paces=(2.0,),
    pods=(4,),
    kinds=KINDS,
    agents=(2, 3),
)
STOPS = Profile("stops", faults={"kill_pod": 1, "cut_pod": 2}, stops=0.01, paces=(4.0,))
LOSSES = Profile(
    "losses", weather=Weather(loss=0.1, reordering=0.1, doubling=0.1), faults={"kill_pod": 3, "close_pod": 1}
)
CLOCKS = Profile(
    "clocks",
    faults={"cut_pod": 4, "freeze_pod": 1, "cut_agent_from_database": 1},
    rate=0.2,
    extreme=True,
    paces=(1.0,),
    usage_lag=0.0,
)

LATE_ANSWERS = Profile(
    "late-answers",
    faults={"cut_pod": 5, "freeze_pod": 3},
    weather=Weather(slow=5.0, slowness=0.02, loss=0.2),
    paces=(2.0,),
    pods=(4,),
)
LATE_WRITES = Profile(
    "late-writes",
    faults={"cut_pod": 8, "freeze_agent": 3, "cut_agent_from_database": 3},
    weather=Weather(),
    doubt=0.15,
    fates=("late",),
    paces=(1.5,),
    pods=(7,),
)
LATE_DEATHS = Profile(
    "late-deaths",
    faults={"cut_pod": 6, "freeze_agent": 3, "cut_agent_from_database": 3},
    weather=Weather(),
    doubt=0.7,
    doubtful="drsm_sessions",
    fates=("late",),
    paces=(1.5,),
    pods=(7,),
)
LATE_CLAIMS = replace(LATE_DEATHS, name="late-claims", doubtful="amfid")
LAGGING = Profile(
    "lagging",
    faults={"cut_pod": 4, "freeze_pod": 4, "kill_agent": 2, "close_pod": 1},
    weather=Weather(),
    lag=0.3,
    paces=(1.5,),
    pods=(6,),
)
RECONNECTS = Profile(
    "reconnects",
    faults={"restart_nats": 4, "cut_agent": 4, "kill_pod": 2},
    weather=Weather(typical=0.05),
    paces=(1.0,),
    pods=(4,),
)


SLOW_TO_SHOW = Profile(
    "slow-to-show",
    faults={"cut_pod": 4, "freeze_pod": 2, "close_pod": 3},
    weather=Weather(loss=0.1),
    paces=(3.0,),
    pods=(4,),
    usage_lag=6.0,
)
COMING_AND_GOING = Profile(
    "coming-and-going",
    faults={"cut_pod": 5, "close_pod": 4, "freeze_pod": 1},
    weather=Weather(loss=0.3),
    paces=(2.0,),
    pods=(6,),
)

INHERITANCE = Profile(
    "inheritance",
    faults={"cut_pod": 1, "close_pod": 1},
    weather=Weather(),
    doubt=0.0,
    lag=0.0,
    stops=0.0,
    cuts=(9.0,),
    paces=(1.0,),
    pods=(6,),
    usage_lag=0.5,
    application=Application(pauses=(0.05, 0.1)),
)
"""Pods that are cut off use ids again and again while others have their chunks, and hold them back."""

DEMUXES = Profile(
    "demuxes",
    faults={
        "kill_demux": 2,
        "freeze_demux": 3,
        "cut_demux": 2,
        "kill_pod": 3,
        "close_pod": 2,
        "kill_agent": 1,
    },
    weather=Weather(slow=6.0, slowness=0.003, loss=0.05, doubling=0.05, reordering=0.05),
    paces=(1.0,),
    pods=(4,),
    demuxes=2,
    storms=(20.0,),
    application=Application(at_once=12, lets_go=0.3),
    idle=0.5,
)
"""Demuxes that come, stand still and go, while chunks change hands all the time."""

WRONG_CLOCKS = Profile(
    "wrong-clocks",
    faults={"cut_pod": 8, "freeze_pod": 1, "kill_agent": 1, "cut_agent_from_database": 1},
    clocks=0.3,
    extreme=True,
    cuts=(2.0, 2.5, 3.0, 7.0),
    paces=(1.5,),
    pods=(4,),
)
"""Clocks that keep no promise: what the leases rest on is gone, but nothing else may break, and pods tell."""

SETTINGS = Profile(
    "settings",
    faults={"change_settings": 3, "cut_pod": 4, "freeze_pod": 2, "kill_pod": 1},
    weather=Weather(),
    paces=(4.0,),
    pods=(4,),
    allocations=(12.0, 5.0),
    livenesses=(4.0, 2.5),
    leaders=(1.0, 2.0),
    kinds=KINDS,
)
"""All agents started again with other settings, one by one."""

RESTORES = Profile(
    "restores",
    faults={"cut_pod": 5, "freeze_pod": 2, "kill_pod": 2, "close_pod": 1, "kill_agent": 1, "cut_agent": 1},
    weather=Weather(loss=0.05),
    paces=(3.0,),
    pods=(4,),
    restores=True,
    kinds=KINDS,
)
"""The database goes back to a backup, and pods have got, given back, lost and claimed chunks since."""

RETURNING = replace(
    RESTORES,
    name="returning",
    faults={"cut_pod": 5},
    weather=Weather(),
    doubt=0.0,
    lag=0.0,
    stops=0.0,
    paces=(2.0,),
    pods=(5,),
    usage_lag=0.2,
    cuts=(10.0, 12.0, 14.0, 16.0),
    allocations=(4.0,),
    lost=(9.0, 14.0),
)
"""Pods that died in the lost time without knowing, and whose chunks others issue from, come back."""

SHRINKING = Profile(
    "shrinking",
    faults={"change_settings": 1, "cut_pod": 5},
    weather=Weather(),
    doubt=0.0,
    lag=0.0,
    stops=0.0,
    paces=(1.5,),
    pods=(5,),
    usage_lag=0.2,
    cuts=(13.0,),
    allocations=(14.0, 4.0),
)
"""`A` becomes smaller while pods are cut off that were promised the larger one."""

WAVERING = replace(
    SHRINKING,
    name="wavering",
    faults={"change_settings": 1, "cut_pod": 1},
    paces=(2.5,),
    cuts=(18.0,),
    allocations=(4.0, 20.0),
)
"""`A` becomes larger and smaller again, and pods are cut off that were promised more than at their start."""

BURSTS = Application(pauses=(0.5, 1.0), at_once=60, lets_go=0.5)

SCARCE = Profile(
    "scarce",
    faults={"cut_demux": 1},
    weather=Weather(),
    doubt=0.4,
    doubtful="amfid",
    fates=("late",),
    lag=0.0,
    stops=0.0,
    pods=(2,),
    block_bits=(7,),
    application=BURSTS,
    idle=0.5,
    ahead=2.0,
)
"""Eight chunks and two pods, which soon get back what they gave away, while writes come late."""

RESTING = Profile(
    "resting",
    faults={"cut_pod": 2, "close_pod": 2, "kill_pod": 1},
    weather=Weather(),
    storms=(12.0,),
    paces=(2.0,),
    kinds=KINDS,
    block_bits=(4,),
    quarantines=(3.0,),
    application=BURSTS,
    idle=0.5,
)
"""Released ids rest, while few are free: at their pod, and at whoever gets its chunks."""

RESTLESS = Profile(
    "restless",
    faults={"restart_nats": 4, "cut_agent": 3, "kill_agent": 1},
    weather=Weather(typical=0.05),
    doubt=0.0,
    lag=0.0,
    stops=0.0,
    paces=(1.0,),
    pods=(4,),
    application=BURSTS,
    idle=0.5,
    ahead=2.0,
)
"""Chunks are asked for and given back all the time, while connections break."""

ABSENCES = Profile(
    "absences",
    faults={"cut_pod": 4},
    weather=Weather(),
    doubt=0.5,
    doubtful="amfid",
    fates=("late",),
    lag=0.0,
    stops=0.0,
    cuts=(13.0, 17.0),
    paces=(1.5,),
    pods=(5,),
    allocations=(4.0,),
    usage_lag=0.2,
)
"""Pods that are away for so long that what reminds of them is deleted, just when they come back."""

NAMESAKES = Profile(
    "namesakes",
    faults={"cut_pod": 4, "close_pod": 2, "kill_pod": 1},
    weather=Weather(slow=6.0, slowness=0.02, doubling=0.3, reordering=0.3),
    doubt=0.0,
    lag=0.0,
    stops=0.0,
    paces=(1.5,),
    pods=(5,),
    usage_lag=0.0,
)
"""Messages about a pod that come when another one of its name lives."""

PLACES = tuple(replace(ANY, name=kind, kinds=(kind,)) for kind in (ADDRESSES, SPACES))
"""Pools of addresses, and of several spaces."""

MIXED = Profile(
    "mixed",
    faults={
        "kill_go": 3,
        "freeze_go": 3,
        "cut_go": 2,
        "delete_pod": 1,
        "kill_pod": 2,
        "close_pod": 1,
        "cut_pod": 2,
        "freeze_pod": 1,
        "kill_agent": 1,
        "freeze_agent": 1,
        "cut_agent_from_database": 1,
        "elect": 1,
    },
    storms=(10.0, 15.0),
    paces=(1.0, 2.0),
    pods=(2, 3),
    allocations=(3.5,),
    freezes=(0.3, 2.0, 4.0),
    cuts=(0.5, 2.0, 3.0, 4.0, 7.0),
    block_bits=(4, 5),
    application=Application(pauses=(0.2, 0.5)),
    go=BesideGo(),
)
"""SDK pods and Go pods on one collection, and both kinds' misfortunes."""

MIGRATION = replace(
    MIXED,
    name="migration",
    faults={
        "to_sdk": 4,
        "to_go": 4,
        "kill_go": 1,
        "kill_pod": 1,
        "beside_namesake": 1,
        "delete_pod": 1,
        "kill_agent": 1,
        "cut_agent_from_database": 1,
    },
    go=BesideGo(pods=(2, 3)),
)
"""Pods of one kind become pods of the other, mostly under their names."""

ROLLBACK = replace(
    MIXED,
    name="rollback",
    faults={"to_go": 3, "to_sdk": 1, "kill_pod": 1, "kill_go": 1},
    weather=Weather(),
    lag=0.0,
    storms=(20.0,),
    pods=(4,),
    go=BesideGo(migrations=(3.0, 8.0)),
)
"""Go pods take SDK pods' names when nobody issues from these pods' chunks any more."""

LATE_DELETES = replace(
    ROLLBACK,
    name="late-deletes",
    faults={"to_go": 3, "to_sdk": 3, "kill_pod": 1, "close_pod": 1},
    doubt=0.4,
    doubtful="amfid",
    fates=("late",),
    go=BesideGo(migrations=(2.0, 10.0)),
)
"""What an agent writes about keepalives comes when somebody else has taken the name."""

LAST_ONES = replace(
    MIXED,
    name="last-ones",
    faults={"kill_go": 2, "cut_go": 3, "cut_pod": 2, "kill_pod": 2, "kill_agent": 1, "end_sdk": 1},
    storms=(15.0,),
    go=BesideGo(pods=(2, 3)),
)
"""All SDK pods end, and only Go pods can claim what they had."""

SURVIVED = replace(
    LAST_ONES,
    name="survived",
    faults={"beside_sdk": 3, "cut_pod": 3, "end_namesake": 3},
    weather=Weather(),
    doubt=0.0,
    lag=0.0,
    pods=(1,),
    storms=(20.0,),
    paces=(0.7, 1.0),
    cuts=(4.0, 7.0),
    idle=0.0,
    go=BesideGo(pods=(2, 3), monitors=(0.3, 1.0), away=(0.1, 4.0)),
)
"""The only SDK pod is cut off and goes on issuing, and a Go pod of its name ends."""

MISSED = replace(
    LAST_ONES,
    name="missed",
    faults={"cut_go": 6, "kill_agent": 1, "end_sdk": 2},
    weather=Weather(),
    paces=(1.0,),
    storms=(20.0,),
    go=BesideGo(pods=(1, 2), cuts=(3.0, 6.0), monitors=(4.0, 15.0)),
)
"""Go pods that are cut off when they should see that a pod is dead."""

SCANNING = replace(
    LAST_ONES, name="scanning", storms=(30.0,), go=BesideGo(pods=(2, 3), scans=True, monitors=(1.0, 4.0))
)
"""Go pods with a callback, which issue from what they have claimed."""

STANDSTILLS = replace(
    MIXED,
    name="standstills",
    faults={"freeze_go": 6, "cut_go": 2, "kill_agent": 1, "cut_pod": 1},
    storms=(20.0,),
    paces=(3.0,),
    go=BesideGo(pods=(2,), freezes=(9.0, 12.0), cuts=(9.0, 12.0), monitors=(1.0, 15.0)),
)
"""Go pods stand still, SDK pods claim their chunks, and they go on."""

ABSENT = replace(
    STANDSTILLS,
    name="absent",
    storms=(30.0,),
    application=BURSTS,
    idle=0.5,
    go=BesideGo(pods=(2, 3), hold=2.0, freezes=(12.0, 15.0), cuts=(12.0, 15.0), monitors=(1.0, 15.0)),
)
"""Go pods come back after SDK pods have issued from their chunks, and have given some back."""

CROWDED = replace(
    MIXED,
    name="crowded",
    faults={"kill_pod": 1, "close_pod": 1, "cut_pod": 2, "kill_go": 1, "kill_agent": 1},
    storms=(20.0,),
    paces=(3.0,),
    block_bits=(4, 5),
    application=BURSTS,
    idle=0.5,
    ahead=2.0,
    go=BesideGo(pods=(1, 2)),
)
"""Chunks come and go, until hardly a number is left that Go pods do not know."""

PROFILES = {
    profile.name: profile
    for profile in (
        ANY,
        *PLACES,
        PARTITIONS,
        LEADERS,
        STOPS,
        LOSSES,
        CLOCKS,
        LATE_ANSWERS,
        LATE_WRITES,
        LATE_DEATHS,
        LATE_CLAIMS,
        LAGGING,
        RECONNECTS,
        SLOW_TO_SHOW,
        COMING_AND_GOING,
        INHERITANCE,
        DEMUXES,
        WRONG_CLOCKS,
        SETTINGS,
        RESTORES,
        RETURNING,
        SHRINKING,
        WAVERING,
        SCARCE,
        RESTING,
        RESTLESS,
        ABSENCES,
        NAMESAKES,
        MIXED,
        MIGRATION,
        ROLLBACK,
        LATE_DELETES,
        LAST_ONES,
        SURVIVED,
        MISSED,
        SCANNING,
        STANDSTILLS,
        ABSENT,
        CROWDED,
    )
}

ALL = "all"
"""Stands for the profiles in turn."""
OTHERS = tuple(name for name in PROFILES if name != ANY.name)
SMALL_WORLDS = 4
"""Of so many seeds all but one are small worlds, which take a fourth of the time of the others."""


def profile_of(seed: int) -> str:
    """Which profile a seed of a run over all has: mostly `any`, now and then each other one in turn."""
    return ANY.name if seed % SMALL_WORLDS else OTHERS[seed // SMALL_WORLDS % len(OTHERS)]
