// SPDX-License-Identifier: MIT

#include "textflag.h"

// func memcpy(to, from *byte, n int)
TEXT ·memcpy(SB), NOSPLIT, $0-24
	MOVQ to+0(FP), DI
	MOVQ from+8(FP), SI
	MOVQ n+16(FP), CX
	CLD
	REP; MOVSB
	RET
