"""What the agent counts and measures, in the Prometheus format. Durations are seconds."""

from math import inf

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter that nobody asked for

LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Metrics:
    """One agent's metrics, in a registry of their own so that two agents can live in one process."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.leading = Gauge("drsm_leader", "1 while this agent leads and serves", registry=r)
        self.term = Gauge("drsm_term", "Term of this agent's last lead", registry=r)
        self.requests = Counter(
            "drsm_requests", "Answered requests by verb and outcome", ["verb", "outcome"], registry=r
        )
        self.request_seconds = Histogram(
            "drsm_request_seconds", "From receipt to answer", ["verb"], buckets=LATENCY_BUCKETS, registry=r
        )
        self.changes = Counter("drsm_changes", "Changes folded from the change stream", registry=r)
        self.events = Counter("drsm_events", "Events published, by verb", ["verb"], registry=r)
        self.republished = Counter(
            "drsm_events_republished", "Batches sent again as NATS had not confirmed them", registry=r
        )
        self.stream_ends = Counter(
            "drsm_stream_ends",
            "Ends of the change stream, by sort and MongoDB's code",
            ["end", "code"],
            registry=r,
        )
        self.contradictions = Counter(
            "drsm_lease_contradictions",
            "Times the lead was taken while its lease still ran: clocks differ by more than 1 %",
            registry=r,
        )
        self.claims = Counter("drsm_claims", "Orphans claimed for a living pod", registry=r)
        self.conflicts = Counter(
            "drsm_conflicts", "Chunk numbers that another allocator had picked first", registry=r
        )
        self.deaths = Counter("drsm_deaths", "Sessions ended, by reason", ["reason"], registry=r)
        self.sessions = Gauge("drsm_sessions", "Sessions that live", registry=r)
        self.chunks = Gauge("drsm_chunks", "Owned chunks", ["pool"], registry=r)
        self.usable = Gauge("drsm_chunks_usable", "Chunks that there are to own", ["pool"], registry=r)
        self.orphans = Gauge("drsm_orphans", "Chunks whose owner is dead", ["pool"], registry=r)
        self.marked = Gauge("drsm_marked", "Claimed chunks that are not scanned yet", ["pool"], registry=r)
        self.marked_overdue = Gauge(
            "drsm_marked_overdue", "Of these, marked a minute longer than their hold", ["pool"], registry=r
        )
        self.only_allocating = Gauge(
            "drsm_pods_only_allocating",
            "Pods that issued three chunks of ids, and never released one",
            ["pool"],
            registry=r,
        )
        self.claimed_by_go = Counter(
            "drsm_claimed_by_go", "Living pods' chunks that Go pods have claimed", ["pool"], registry=r
        )
        self.go_came_back = Counter(
            "drsm_go_came_back",
            "Chunks claimed from Go pods that were silent and issue again",
            ["pool"],
            registry=r,
        )
        self.go_alarms = Gauge(
            "drsm_go_alarms",
            "1 while something stands in the way of Go pods on the same collection",
            ["pool", "alarm"],
            registry=r,
        )
        self.stream_staleness = Gauge(
            "drsm_stream_staleness_seconds", "Since the change stream last said something", registry=r
        )
        self.position_standstill = Gauge(
            "drsm_stream_standstill_seconds", "Since the change stream's position last moved", registry=r
        )
        for gauge in (self.stream_staleness, self.position_standstill):
            gauge.set(inf)  # until the first batch: an agent that waits for MongoDB is not fresh
        self.bus_errors = Counter("drsm_nats_errors", "Errors reported by the NATS connection", registry=r)
        self.bus_reconnects = Counter("drsm_nats_reconnects", "Reconnects to NATS", registry=r)

    def lead_over(self) -> None:
        """What only a leader knows is not said any more: another agent says it, and this one's would stay as
        it was for ever. (A gauge without labels cannot be taken back: nobody lives here.)"""
        self.sessions.set(0)
        for gauge in (
            self.chunks,
            self.usable,
            self.orphans,
            self.marked,
            self.marked_overdue,
            self.only_allocating,
            self.go_alarms,
        ):
            gauge.clear()
