/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _KVMACCESS_VERSION_H
#define _KVMACCESS_VERSION_H

#define KVMACCESS_VERSION "0.1.0"

#endif /* _KVMACCESS_VERSION_H */
