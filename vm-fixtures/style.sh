#!/bin/sh
# SPDX-License-Identifier: MIT
# Runs checkpatch over the C sources. It comes out of Debian's kernel source,
# which is installed if need be, and is kept in the cache.
set -eu
cd "$(dirname "$0")/.."
scripts="${XDG_CACHE_HOME:-$HOME/.cache}/kvmaccess/checkpatch"
if [ ! -e "$scripts/complete" ]; then
	archive=$(ls /usr/src/linux-source-*.tar.xz 2>/dev/null | tail -n 1)
	if [ -z "$archive" ]; then
		echo 'style: installing linux-source'
		apt-get -q update
		DEBIAN_FRONTEND=noninteractive apt-get -q -y install --no-install-recommends linux-source perl xz-utils
		archive=$(ls /usr/src/linux-source-*.tar.xz | tail -n 1)
	fi
	mkdir -p "$scripts"
	tar -xJf "$archive" -C "$scripts" --strip-components=2 --wildcards \
		'*/scripts/checkpatch.pl' '*/scripts/spelling.txt' '*/scripts/const_structs.checkpatch'
	touch "$scripts/complete"
fi
# What does not fit a module outside the kernel's tree, or assembly, is left out.
perl "$scripts/checkpatch.pl" --no-tree --no-summary --terse --strict --show-types --file \
	--ignore FILE_PATH_CHANGES,SPDX_LICENSE_TAG,LINUX_VERSION_CODE,CONSTANT_COMPARISON \
	--ignore AVOID_EXTERNS,EMBEDDED_FUNCTION_NAME,MACRO_ARG_PRECEDENCE "$@" \
	$(git ls-files 'kmod/*.c' 'kmod/*.h' 'vm-fixtures/attacks/*.c' 'vm-fixtures/attacks/*.h')
