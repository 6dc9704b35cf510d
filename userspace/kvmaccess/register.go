// SPDX-License-Identifier: MIT

package kvmaccess

// at is where a register that can be watched is kept: one of the two, or none.
func (r *Registers) at(x Register) (wide *uint64, narrow *uint16) {
	switch x {
	case RegisterCR0:
		return &r.CR0, nil
	case RegisterCR3:
		return &r.CR3, nil
	case RegisterCR4:
		return &r.CR4, nil
	case RegisterEFER:
		return &r.EFER, nil
	case RegisterGDTRBase:
		return &r.GDTR.Base, nil
	case RegisterGDTRLimit:
		return nil, &r.GDTR.Limit
	case RegisterIDTRBase:
		return &r.IDTR.Base, nil
	case RegisterIDTRLimit:
		return nil, &r.IDTR.Limit
	case RegisterTRBase:
		return &r.TR.Base, nil
	case RegisterTRSelector:
		return nil, &r.TR.Selector
	case RegisterLDTRSelector:
		return nil, &r.LDTR.Selector
	case RegisterDR0:
		return &r.DR0, nil
	case RegisterDR1:
		return &r.DR1, nil
	case RegisterDR2:
		return &r.DR2, nil
	case RegisterDR3:
		return &r.DR3, nil
	case RegisterDR7:
		return &r.DR7, nil
	case RegisterSTAR:
		return &r.STAR, nil
	case RegisterLSTAR:
		return &r.LSTAR, nil
	case RegisterCSTAR:
		return &r.CSTAR, nil
	case RegisterSFMASK:
		return &r.SFMASK, nil
	case RegisterSysenterCS:
		return &r.SysenterCS, nil
	case RegisterSysenterESP:
		return &r.SysenterESP, nil
	case RegisterSysenterEIP:
		return &r.SysenterEIP, nil
	case RegisterPAT:
		return &r.PAT, nil
	}
	return nil, nil
}

// Get returns the value of a register that can be watched, as an item of the
// module has it; 0 of an unknown one.
func (r *Registers) Get(x Register) uint64 {
	switch wide, narrow := r.at(x); {
	case wide != nil:
		return *wide
	case narrow != nil:
		return uint64(*narrow)
	}
	return 0
}

// Set sets a register that can be watched, of a limit or selector the 16 bits
// that it has. It returns false, and does nothing, of an unknown one.
func (r *Registers) Set(x Register, value uint64) bool {
	switch wide, narrow := r.at(x); {
	case wide != nil:
		*wide = value
	case narrow != nil:
		*narrow = uint16(value)
	default:
		return false
	}
	return true
}
