// SPDX-License-Identifier: GPL-2.0-only
/*
 * What a watch tells its owner, and how often. An item keeps what it may not
 * tell now: the number of changes, of which the next event is the last one's.
 */
#include <linux/ktime.h>
#include <linux/timekeeping.h>
#include <net/sock.h>

#include "netlink.h"
#include "notify.h"
#include "tick.h"

/* Rates of events: what may come at once, and ns for each from then on. */
#define ITEM_BURST	16
#define ITEM_INTERVAL	(10 * NSEC_PER_MSEC)
#define WATCH_BURST	512
#define WATCH_INTERVAL	NSEC_PER_MSEC

/* What events may take of the memory of a socket: some hundred of them. */
#define MAX_UNREAD	(512 << 10)

static bool is_allowed(u64 allowed, u64 now, u64 interval, unsigned int burst)
{
	return allowed <= now + (burst - 1) * interval;
}

/*
 * Note how something is found. The host exchanges pages, to copy or to move
 * them, and has none in place for an instant: a page that is gone is so twice.
 */
void kvmaccess_event_observe(struct kvmaccess_watch *w, struct kvmaccess_track *track,
			     enum kvmaccess_state state, u64 seen)
{
	bool absent = state == KVMACCESS_STATE_NOT_RESIDENT;

	if (unlikely(absent && track->state != state && !track->absent)) {
		track->absent = true;
		w->untold = true;
		return;
	}
	track->absent = absent;
	if (likely(track->state == state && track->seen == seen))
		return;
	w->stats.in_state[track->state]--;
	w->stats.in_state[state]++;
	track->state = state;
	track->seen = seen;
	if (track->pending != U32_MAX)
		track->pending++;
}

/*
 * Events have a quarter of the owner's buffer, and wait here beyond that, where
 * they are fewer the longer they wait. The rest is for answers to requests: of
 * one that finds the buffer full nobody is told, if the reader has been told of
 * events that found it so. Answers stand behind events, so these are not many.
 */
static bool has_room(const struct kvmaccess_watch *w)
{
	return atomic_read(&w->sk->sk_rmem_alloc) <
	       min(READ_ONCE(w->sk->sk_rcvbuf) / 4, MAX_UNREAD);
}

/*
 * The number of a socket that is closed may be another one's, and is for as
 * long as its watches do not know: some microseconds.
 */
static int send(struct kvmaccess_watch *w, const struct kvmaccess_watch_event *e)
{
	int err = READ_ONCE(w->deaf) ? -ECONNREFUSED :
		  kvmaccess_netlink_watch_event(w->stats.portid, e);

	if (err) {
		w->stats.lost++;
		return err;
	}
	w->stats.events++;
	kvmaccess_notify_watch(e);
	return 0;
}

/*
 * Send an event if there is something to tell, and it may be told by now. What
 * could not be told is told by a later tick.
 */
void kvmaccess_event_tell(struct kvmaccess_watch *w, struct kvmaccess_item *item,
			  struct kvmaccess_track *track, struct kvmaccess_watch_event *e)
{
	if (!track->pending)
		return;
	if (!is_allowed(item->allowed, w->now, ITEM_INTERVAL, ITEM_BURST) ||
	    !is_allowed(w->allowed, w->now, WATCH_INTERVAL, WATCH_BURST) || !has_room(w)) {
		w->untold = true;
		return;
	}
	item->allowed = max(item->allowed, w->now) + ITEM_INTERVAL;
	w->allowed = max(w->allowed, w->now) + WATCH_INTERVAL;

	e->watch = w->stats.id;
	e->vm_id = w->stats.vm_id;
	e->cookie = item->cookie;
	e->kind = item->kind;
	e->state = track->state;
	e->time = w->now;
	e->tick = w->stats.ticks;
	e->coalesced = track->pending - 1;
	e->lost = w->lost;
	if (send(w, e)) {
		w->lost++;
		w->untold = true;
		return;
	}
	track->pending = 0;
	w->lost = 0;
	w->stats.coalesced += e->coalesced;
}

/* The VM is gone, or the module goes; the owner is told. */
void kvmaccess_event_end(struct kvmaccess_watch *w)
{
	struct kvmaccess_watch_event e = {
		.watch = w->stats.id,
		.vm_id = w->stats.vm_id,
		.state = KVMACCESS_STATE_ENDED,
		.time = ktime_get_ns(),
		.tick = w->stats.ticks,
		.lost = w->lost,
	};

	if (w->stats.flags & KVMACCESS_WATCH_F_ENDED)
		return;
	/* The timer reads it. */
	WRITE_ONCE(w->stats.flags, w->stats.flags | KVMACCESS_WATCH_F_ENDED);
	send(w, &e);
}
