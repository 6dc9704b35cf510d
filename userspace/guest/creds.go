// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
)

// Cred are the credentials of tasks; several may share them. Ids are those of
// the initial user namespace.
type Cred struct {
	Address        uint64 `json:"address"`
	Usage          int64  `json:"usage"` // references
	UID            uint32 `json:"uid"`
	GID            uint32 `json:"gid"`
	SUID           uint32 `json:"suid"`
	SGID           uint32 `json:"sgid"`
	EUID           uint32 `json:"euid"`
	EGID           uint32 `json:"egid"`
	FSUID          uint32 `json:"fsuid"`
	FSGID          uint32 `json:"fsgid"`
	Securebits     uint32 `json:"securebits"`
	CapInheritable uint64 `json:"cap_inheritable"`
	CapPermitted   uint64 `json:"cap_permitted"`
	CapEffective   uint64 `json:"cap_effective"`
	CapBounding    uint64 `json:"cap_bounding"`
	CapAmbient     uint64 `json:"cap_ambient"`
	UserNS         uint64 `json:"user_ns"`
}

// Cred reads a struct cred. The error is an *ObjectError.
func (k *Kernel) Cred(ctx context.Context, addr uint64) (Cred, error) {
	c := Cred{Address: addr}
	o, err := k.Object(ctx, "cred", addr)
	if err != nil {
		return c, err
	}
	var errs []error
	id := func(path string) uint32 {
		v, err := o.Uint(path + ".val")
		errs = append(errs, err)
		return uint32(v)
	}
	// Two words up to 6.2, one since.
	caps := func(path string) uint64 {
		p, err := o.Bytes(path)
		if err == nil && len(p) != 8 {
			err = o.fail(fmt.Errorf("%w: %s has %d bytes", ErrBadTypes, path, len(p)))
		}
		if err != nil {
			errs = append(errs, err)
			return 0
		}
		return binary.LittleEndian.Uint64(p)
	}
	c.UID, c.GID, c.SUID, c.SGID = id("uid"), id("gid"), id("suid"), id("sgid")
	c.EUID, c.EGID, c.FSUID, c.FSGID = id("euid"), id("egid"), id("fsuid"), id("fsgid")
	c.CapInheritable, c.CapPermitted, c.CapEffective = caps("cap_inheritable"), caps("cap_permitted"), caps("cap_effective")
	c.CapBounding, c.CapAmbient = caps("cap_bset"), caps("cap_ambient")
	bits, err1 := o.Uint("securebits")
	ns, err2 := o.Pointer("user_ns")
	usage := "usage.counter"
	if !o.Has(usage) {
		usage = "usage.refs.counter"
	}
	n, err3 := o.Int(usage)
	c.Securebits, c.UserNS, c.Usage = uint32(bits), ns, n
	return c, errors.Join(append(errs, err1, err2, err3)...)
}

// TaskCreds reads both credentials of a task: what it is to others (real_cred)
// and what it acts with (cred), which is another only for moments. The error is
// an *ObjectError.
func (k *Kernel) TaskCreds(ctx context.Context, task uint64) (objective, subjective Cred, err error) {
	o, err := k.Part(ctx, "task_struct", task, "real_cred", "cred")
	if err != nil {
		return objective, subjective, err
	}
	real, err1 := o.Pointer("real_cred")
	eff, err2 := o.Pointer("cred")
	if err := errors.Join(err1, err2); err != nil {
		return objective, subjective, err
	}
	if objective, err = k.Cred(ctx, real); err != nil || eff == real {
		return objective, objective, err
	}
	subjective, err = k.Cred(ctx, eff)
	return objective, subjective, err
}
