// SPDX-License-Identifier: MIT

package main

import (
	"context"
	"os"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"kvmaccess": func() { os.Exit(newApp(os.Stdout, os.Stderr).run(context.Background(), os.Args[1:])) },
	})
}

// TestScripts runs the program as it is, as far as it gets without a guest.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Condition: func(cond string) (bool, error) {
			if cond != "module" {
				return false, nil
			}
			b, err := os.ReadFile("/proc/modules")
			if os.IsNotExist(err) {
				return false, nil
			}
			return strings.Contains("\n"+string(b), "\nkvmaccess "), err
		},
	})
}
