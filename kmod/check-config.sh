#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# check-config.sh RELEASE BUILD-DIRECTORY
#
# Name the options that the kernel RELEASE lacks, and what each is for. Its
# configuration is BUILD-DIRECTORY/.config, else /boot/config-RELEASE, else
# /proc/config.gz if that kernel is running.
#
# Exit code 0: the module builds and works, perhaps without the capabilities
# that were named; 1: it does not; 2: there is no configuration to look at.
set -eu

if [ $# -ne 2 ]; then
	echo 'usage: check-config.sh RELEASE BUILD-DIRECTORY' >&2
	exit 2
fi
release=$1
build=$2

if [ -r "$build/.config" ]; then
	source=$build/.config
	config=$(cat "$source")
elif [ -r "/boot/config-$release" ]; then
	source=/boot/config-$release
	config=$(cat "$source")
elif [ -r /proc/config.gz ] && [ "$release" = "$(uname -r)" ]; then
	source=/proc/config.gz
	config=$(gzip -dc "$source")
else
	echo "check-config: no configuration of kernel $release in $build/.config, /boot/config-$release or" >&2
	echo "/proc/config.gz (the running kernel is $(uname -r)): install linux-headers-$release, or say where by KDIR" >&2
	exit 2
fi

# value NAME: y, m, or nothing
value() {
	printf '%s\n' "$config" | sed -n "s/^CONFIG_$1=\([ym]\)\$/\1/p"
}

required=0
costs=0

# says CLASS OPTION TEXT
says() {
	printf 'check-config: %-9s %-30s %s\n' "$1" "$2" "$3" >&2
}

# need OPTION WHAT-FOR: without it there is no module
need() {
	[ -z "$(value "$1")" ] || return 0
	required=$((required + 1))
	says required "CONFIG_$1" "$2"
}

# want OPTION WHAT-IS-LOST: without it the rest works
want() {
	[ -z "$(value "$1")" ] || return 0
	costs=$((costs + 1))
	says wanted "CONFIG_$1" "without it: $2"
}

# avoid OPTION WHAT-THEN: with it the module may be refused
avoid() {
	[ -n "$(value "$1")" ] || return 0
	costs=$((costs + 1))
	says beware "CONFIG_$1" "$2"
}

need X86_64 'the guests that are read are those of x86-64 hosts'
need MODULES 'this is a module'
need NET 'programs talk to the module by generic netlink'
need KVM 'the guests are those of KVM'
if [ -z "$(value KVM_AMD)$(value KVM_INTEL)" ]; then
	required=$((required + 1))
	says required 'CONFIG_KVM_AMD or _KVM_INTEL' 'KVM runs guests by one of them'
fi
need KPROBES "KVM's own symbols are found by a probe, and the end of a VM is seen by one"
need KALLSYMS "KVM's own symbols are looked up by name"
need KALLSYMS_ALL 'the list of VMs is data, whose names are kept by this only'

# Without KPROBES there is no KRETPROBES to speak of, and so on.
[ -z "$(value KPROBES)" ] ||
	want KRETPROBES 'a new VM is found by the next request, not announced at once'
want DYNAMIC_FTRACE_WITH_ARGS 'each look at a VM searches the list of all of them'
want HIGH_RES_TIMERS 'items are watched at the pace of the scheduler'"'"'s tick at most'
registers='no registers, no descriptor tables, no memory by virtual address; physical memory and VMs only'
want SYSFS "$registers (type information is read from /sys/kernel/btf)"
want DEBUG_INFO_BTF "$registers (KVM's layouts are in the type information)"
case $(value DEBUG_INFO_BTF)$(value KVM_AMD)$(value KVM_INTEL) in
y*m*) want DEBUG_INFO_BTF_MODULES "$registers (kvm-amd or kvm-intel is a module)" ;;
esac
want MODULE_UNLOAD 'the module stays until the next boot'

avoid TRIM_UNUSED_KSYMS 'what the module links to may not be exported; then the build fails'
for option in MODULE_SIG_FORCE LOCK_DOWN_KERNEL_FORCE_INTEGRITY LOCK_DOWN_KERNEL_FORCE_CONFIDENTIALITY; do
	avoid $option 'only a module signed by a key that the kernel trusts is loaded'
done

if [ $required -gt 0 ]; then
	echo "check-config: $source: options missing without which the module does not work: $required" >&2
	exit 1
fi
if [ $costs -gt 0 ]; then
	echo "check-config: $source: the module works, with what is said above"
else
	echo "check-config: $source: all that the module needs is there"
fi
