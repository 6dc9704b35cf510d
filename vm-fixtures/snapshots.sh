#!/bin/sh
# SPDX-License-Identifier: MIT
#
# snapshots.sh VMFIXTURE: record anew the guests that unit tests read. Each is
# booted under an emulator and dumped; of the dump, and of what the guest said
# of itself, the programs in userspace/guest/testdata make what is kept.
set -eu

fixture=$1
data=userspace/guest/testdata
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

command -v xz >/dev/null || {
	echo "snapshots: install xz-utils" >&2
	exit 1
}

# dump NAME KERNEL [OPTION]...: into $tmp/NAME
dump() {
	name=$1 kernel=$2
	shift 2
	echo "== $name: Linux $kernel $*"
	"$fixture" dump --guest "$kernel" "$@" "$tmp/$name"
}

# Kernels with page-table isolation, all CPUs in user mode; and 5-level paging.
attach() {
	dump "$@"
	go run ./$data/attach -out "$data/attach/$1.snapshot" "$tmp/$1/mem" "$tmp/$1/kallsyms" "$tmp/$1/version"
	rm -rf "${tmp:?}/$1"
}
attach debian11 5.10 --append pti=on --user
attach debian12 6.1 --cpu max
attach debian13 6.12 --append pti=on --user
attach sid 7.2 --append pti=on --user

# One CPU, and four; 5-level paging; all CPUs in user mode.
objects() {
	dump "$@"
	go run ./$data/objects -dump "$tmp/$1/mem" -ps "$tmp/$1/ps" -ps-after "$tmp/$1/ps-after" -modules "$tmp/$1/modules" \
		-note "Linux $2, under QEMU (TCG)" -o "$data/objects/$1"
	rm -rf "${tmp:?}/$1"
}
objects debian11 5.10
objects debian12 6.1 --smp 4
objects debian13 6.12 --cpu max
objects sid 7.2 --smp 4 --append pti=on --user

dump debian12 6.1 --append pti=on --user
go run ./$data/whole -dump "$tmp/debian12/mem" -truth "$tmp/debian12" \
	-note "Linux 6.1, page-table isolation, one CPU in user mode, under QEMU (TCG)" -o $data/whole/debian12
