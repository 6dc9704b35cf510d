// SPDX-License-Identifier: MIT

// Package daemon watches every VM of this host and tells what it found.
//
// It is a handful of services under one run group: a watcher that knows the
// host's VMs and has each checked by a keeper, a journal that keeps findings and
// baselines through restarts and writes findings out as JSON lines, and an
// HTTP/JSON API on a unix socket, which Dial opens for Go programs.
//
// In poll mode the keepers' ticks share a lane, which runs them on a schedule. In
// watch mode a keeper looks at its VM, has the module compare what it saw (guard),
// and sleeps until the module tells of a change; then it reads again what the
// events are of, and looks at all of the VM by the same tick, and what either
// finds goes the same way. The code of guests' kernels has a watch of its own
// (codeWatch), and a budget may choose the periods.
//
// Who follows findings is told of one before it is stored, and the findings file
// after that, unless the store cannot be written. Stored with it is that it is
// open. So a daemon that is killed right after it told one to a follower may know
// nothing of it: its next start finds the same again, if it still holds, and may
// give its number to another one. What is stored keeps its number and is not told
// again.
//
// # API
//
// Every answer is JSON; an error is {"error": "what happened and what to do"}
// with an HTTP status of 400 or above. VM stands for a VM's id, its name, or
// its UUID; a name that two VMs share is refused with 409.
//
//	GET    /v1/health          Health
//	GET    /v1/vms             []VMStatus
//	GET    /v1/stats           Stats
//	GET    /v1/findings        []Record, oldest first
//	         ?vm=VM            of one VM, also one that is gone
//	         ?since=N|TIME     after sequence number N, or from an RFC 3339
//	                           time on
//	         ?follow=1         one Record a line, without end, each as soon as
//	                           it is made; blank lines keep the connection
//	                           alive
//	GET    /v1/baselines/VM    integrity.Baseline
//	DELETE /v1/baselines/VM    204; the VM's present state becomes its baseline
package daemon
