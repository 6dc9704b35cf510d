// SPDX-License-Identifier: MIT

package daemon

import (
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// WatchAccount is what the module's watches of a VM do and have done, those
// before the present ones included. Durations are in ns.
type WatchAccount struct {
	Period    time.Duration `json:"period"`    // that was asked for; 0: there is no watch
	Effective time.Duration `json:"effective"` // or what that was stretched to: a tick takes too long for it
	Items     int           `json:"items"`
	Bytes     uint64        `json:"bytes"`     // compared in each tick
	Ticks     uint64        `json:"ticks"`     //
	Missed    uint64        `json:"missed"`    // ticks that did not take place: the one before was under way
	Late      uint64        `json:"late"`      // ticks that began more than 1 ms after their time
	Latest    time.Duration `json:"latest"`    // what a tick began after its time, at most
	Time      time.Duration `json:"time"`      // of all ticks
	Longest   time.Duration `json:"longest"`   // tick
	Captures  uint64        `json:"captures"`  // of vCPUs
	Skipped   uint64        `json:"skipped"`   // vCPUs that had not run, in all ticks
	Failed    uint64        `json:"failed"`    // captures
	Events    uint64        `json:"events"`    // sent
	Coalesced uint64        `json:"coalesced"` // changes that another event stands for
	Lost      uint64        `json:"lost"`      // events that could not be delivered, and were told later

	Different   int `json:"different"`    // what is not as expected now, and is about to be looked at
	NotResident int `json:"not_resident"` // what the host has no page of in place
	NoMemslot   int `json:"no_memslot"`   // what lies at no memory of the VM

	Restless int    `json:"restless"` // places that change all the time, and are left to rounds
	Rearmed  uint64 `json:"rearmed"`  // times that all watches were made anew

	Code *CodeAccount `json:"code,omitempty"` // beside all of the above

	Passes   uint64 `json:"-"` // of digests
	Compared uint64 `json:"-"` // bytes so far
}

func watchAccount(s kvmaccess.WatchStats) WatchAccount {
	return WatchAccount{
		Period: s.Period, Effective: s.Effective, Items: s.Items, Bytes: s.Bytes,
		Ticks: s.Ticks, Missed: s.Missed, Late: s.Late, Latest: s.Latest, Time: s.Time, Longest: s.Longest,
		Captures: s.Captures, Skipped: s.Skipped, Failed: s.Failed,
		Events: s.Events, Coalesced: s.Coalesced, Lost: s.Lost,
		Different: s.Different, NotResident: s.NotResident, NoMemslot: s.NoMemslot,
		Passes: s.Passes, Compared: s.Compared,
	}
}

// add adds what one more watch has done and how it is.
func (a WatchAccount) add(b WatchAccount) WatchAccount {
	a.Period, a.Effective = max(a.Period, b.Period), max(a.Effective, b.Effective)
	a.Items += b.Items
	a.Bytes += b.Bytes
	a.Ticks += b.Ticks
	a.Missed += b.Missed
	a.Late += b.Late
	a.Latest = max(a.Latest, b.Latest)
	a.Time += b.Time
	a.Longest = max(a.Longest, b.Longest)
	a.Captures += b.Captures
	a.Skipped += b.Skipped
	a.Failed += b.Failed
	a.Events += b.Events
	a.Coalesced += b.Coalesced
	a.Lost += b.Lost
	a.Different += b.Different
	a.NotResident += b.NotResident
	a.NoMemslot += b.NoMemslot
	a.Restless += b.Restless
	a.Rearmed += b.Rearmed
	a.Passes += b.Passes
	a.Compared += b.Compared
	return a
}

// past is what remains of an account when its watch is closed.
func (a WatchAccount) past() WatchAccount {
	a.Period, a.Effective, a.Items, a.Bytes = 0, 0, 0, 0
	a.Different, a.NotResident, a.NoMemslot = 0, 0, 0
	return a
}
