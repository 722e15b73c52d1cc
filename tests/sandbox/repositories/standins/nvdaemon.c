/* SPDX-FileCopyrightText: The gpu_fleet.nim authors
 * SPDX-License-Identifier: GPL-3.0-or-later
 *
 * Stand-in for the driver's daemons: nvidia-persistenced, nv-fabricmanager and nvidia-imex, told apart by their name.
 * Each refuses a driver of another version, holds the devices open as the real one does and goes into the background.
 * Built with -DVERSION="580.95.05".
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *BASE = "/proc/driver/nvidia-standin";
static char pid_file[128];
static int is_fabric;

static int loaded_version(char *version, size_t room) {
    char path[128];
    snprintf(path, sizeof path, "%s/version", BASE);
    FILE *source = fopen(path, "r");
    if (!source)
        return 0;
    int ok = fgets(version, (int)room, source) != NULL;
    fclose(source);
    version[strcspn(version, "\n")] = 0;
    return ok;
}

static void user_space_version(char *version, size_t room) {
    char target[128];
    ssize_t length = readlink("/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1", target, sizeof target - 1);
    char *found;
    if (length < 0)
        return;
    target[length] = 0;
    if ((found = strstr(target, ".so.")))
        snprintf(version, room, "%s", found + 4);
}

static void stop(int signal_number) {
    (void)signal_number;
    if (is_fabric)
        unlink("/proc/driver/nvidia-standin/fabric");
    unlink(pid_file);
    _exit(0);
}

int main(int argc, char **argv) {
    (void)argc;
    const char *name = strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argv[0];
    char version[64] = "", own[64] = VERSION, directory[96];
    is_fabric = !strcmp(name, "nv-fabricmanager");
    snprintf(directory, sizeof directory, "/run/%s", is_fabric ? "nvidia-fabricmanager" : name);
    snprintf(pid_file, sizeof pid_file, "%s/%s.pid", directory, name);
    if (!loaded_version(version, sizeof version) && access("/usr/bin/nvidia-modprobe", X_OK) == 0) {
        if (system("/usr/bin/nvidia-modprobe -u >/dev/null 2>&1") < 0)
            perror(name);
    }
    if (!loaded_version(version, sizeof version)) {
        fprintf(stderr, "%s failed to initialize: the NVIDIA driver is not loaded. Check syslog for more details.\n", name);
        return 1;
    }
    /* The persistence daemon takes the driver's library, whatever its own version is; the others must be the same. */
    if (!strcmp(name, "nvidia-persistenced"))
        user_space_version(own, sizeof own);
    if (strcmp(version, own)) {
        if (is_fabric)
            fprintf(stderr, "fabric manager NVIDIA GPU driver interface version %s don't match with driver version %s. Please update with matching NVIDIA driver package.\n", own, version);
        else
            fprintf(stderr, "%s failed to initialize. Check syslog for more details. (version %s, driver %s)\n", name, own, version);
        return 1;
    }
    if (is_fabric && access("/proc/driver/nvidia-nvswitch/devices", F_OK) != 0) {
        fprintf(stderr, "request to query NVSwitch device information from NVSwitch driver failed with error:WARNING Nothing to do [NV_WARN_NOTHING_TO_DO]\n");
        return 1;
    }
    DIR *devices = opendir("/dev");
    struct dirent *entry;
    while (devices && (entry = readdir(devices))) {
        int minor, taken;
        char path[300];
        if (strcmp(entry->d_name, "nvidiactl") &&
            (sscanf(entry->d_name, "nvidia%d%n", &minor, &taken) != 1 || entry->d_name[taken]))
            continue;
        snprintf(path, sizeof path, "/dev/%s", entry->d_name);
        if (open(path, O_RDWR) < 0) /* not close-on-exec and never closed: this is what keeps the driver in use */
            perror(path);
    }
    if (devices)
        closedir(devices);
    mkdir(directory, 0755);
    pid_t child = fork();
    if (child < 0)
        return 1;
    if (child == 0) {
        setsid();
        signal(SIGTERM, stop);
        signal(SIGINT, stop);
        if (is_fabric) {
            int done = open("/proc/driver/nvidia-standin/fabric", O_CREAT | O_WRONLY, 0644);
            if (done >= 0)
                close(done);
        }
        int null = open("/dev/null", O_RDWR);
        dup2(null, 0);
        dup2(null, 1);
        dup2(null, 2);
        for (;;)
            pause();
    }
    FILE *out = fopen(pid_file, "w");
    if (out) {
        fprintf(out, "%d\n", child);
        fclose(out);
    }
    return 0;
}
