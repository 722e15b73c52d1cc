/* SPDX-FileCopyrightText: The gpu_fleet.nim authors
 * SPDX-License-Identifier: GPL-3.0-or-later
 *
 * Stand-in for nvidia-smi. It talks to the stand-in kernel module: the description of the GPUs that the stand-in
 * modprobe left in /proc/driver/nvidia-standin (in a container: /run/nvidia-kernel/nvidia-standin). The XML of a GPU is
 * a real capture (GPU_XML, made from the captures by build.py) in which the values of this GPU are set.
 *
 * Static and without any file of its own beside it, because the container runtime mounts it into any image.
 * Built with -DVERSION="580.95.05" -DCUDA="13.0" -DBRANCH=580.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "gpu_xml.h"

#define MAX_GPUS 32
#define MAX_KEYS 64
#define MAX_PROCESSES 256

struct gpu {
    int keys;
    char *key[MAX_KEYS];
    char *value[MAX_KEYS];
    int minor;
    int index;
    char *xml;
};
struct process {
    int pid;
    int gpu;
    long memory;
    char name[256];
};

static const char *base;
static struct gpu gpus[MAX_GPUS];
static int gpu_count;
static struct process processes[MAX_PROCESSES];
static int process_count;

static char *read_file(const char *path, size_t *length) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return NULL;
    size_t size = 0, room = 65536;
    char *text = malloc(room + 1);
    ssize_t got;
    while ((got = read(fd, text + size, room - size)) > 0) {
        size += (size_t)got;
        if (size == room) {
            room *= 2;
            text = realloc(text, room + 1);
        }
    }
    close(fd);
    text[size] = 0;
    if (length)
        *length = size;
    return text;
}

static const char *get(const struct gpu *gpu, const char *key, const char *otherwise) {
    for (int i = 0; i < gpu->keys; i++)
        if (!strcmp(gpu->key[i], key))
            return gpu->value[i];
    return otherwise;
}

/* Where <name> of an element starts after `from`; the text between the tags is returned by its borders. */
static int element(const char *from, const char *name, const char **start, const char **end) {
    char open_tag[128], close_tag[128];
    snprintf(open_tag, sizeof open_tag, "<%s>", name);
    snprintf(close_tag, sizeof close_tag, "</%s>", name);
    const char *found = strstr(from, open_tag);
    if (!found)
        return 0;
    *start = found + strlen(open_tag);
    *end = strstr(*start, close_tag);
    return *end != NULL;
}

/* Sets the text of `path` ("a/b": b inside the first a). */
static void set_element(char **xml, const char *path, const char *value) {
    char copy[256];
    snprintf(copy, sizeof copy, "%s", path);
    const char *from = *xml, *start = NULL, *end = NULL;
    for (char *part = strtok(copy, "/"); part; part = strtok(NULL, "/")) {
        if (!element(from, part, &start, &end))
            return;
        from = start;
    }
    size_t before = (size_t)(start - *xml);
    char *result = malloc(before + strlen(value) + strlen(end) + 1);
    memcpy(result, *xml, before);
    strcpy(result + before, value);
    strcat(result, end);
    free(*xml);
    *xml = result;
}

static const char *text_of(const struct gpu *gpu, const char *path) {
    static char slots[16][512];
    static int slot;
    char copy[256];
    char *result = slots[slot++ % 16];
    snprintf(copy, sizeof copy, "%s", path);
    const char *from = gpu->xml, *start = NULL, *end = NULL;
    for (char *part = strtok(copy, "/"); part; part = strtok(NULL, "/")) {
        if (!element(from, part, &start, &end))
            return "N/A";
        from = start;
    }
    snprintf(result, 512, "%.*s", (int)(end - start), start);
    return result;
}

static char *replace_all(char *text, const char *old, const char *new) {
    size_t count = 0, old_length = strlen(old), new_length = strlen(new);
    for (char *at = strstr(text, old); at; at = strstr(at + old_length, old))
        count++;
    char *result = malloc(strlen(text) + count * new_length + 1), *out = result, *from = text, *at;
    while ((at = strstr(from, old))) {
        memcpy(out, from, (size_t)(at - from));
        out += at - from;
        memcpy(out, new, new_length);
        out += new_length;
        from = at + old_length;
    }
    strcpy(out, from);
    free(text);
    return result;
}

static void remove_element(char **xml, const char *name) {
    char tag[128];
    const char *start, *end;
    if (!element(*xml, name, &start, &end))
        return;
    char *first = (char *)start - strlen(name) - 2;
    while (first > *xml && first[-1] == '\t')
        first--;
    snprintf(tag, sizeof tag, "</%s>\n", name);
    const char *rest = end + strlen(tag);
    memmove(first, rest, strlen(rest) + 1);
}

static int is_driver_daemon(const char *comm) {
    return !strncmp(comm, "nvidia-persiste", 15) || !strncmp(comm, "nv-fabricmanage", 15) ||
           !strncmp(comm, "nvidia-imex", 11) || !strncmp(comm, "nvidia-smi", 10);
}

/* Processes that hold /dev/nvidiaN open. What one uses is STANDIN_GPU_MEMORY_MIB of its environment, or 512 MiB. */
static void find_processes(void) {
    DIR *proc = opendir("/proc");
    struct dirent *entry;
    while (proc && (entry = readdir(proc))) {
        char path[300], target[256], *text;
        int seen[MAX_GPUS] = {0};
        if (!isdigit(entry->d_name[0]))
            continue;
        snprintf(path, sizeof path, "/proc/%s/comm", entry->d_name);
        text = read_file(path, NULL);
        if (!text || is_driver_daemon(text)) {
            free(text);
            continue;
        }
        free(text);
        snprintf(path, sizeof path, "/proc/%s/fd", entry->d_name);
        DIR *fds = opendir(path);
        struct dirent *fd;
        while (fds && (fd = readdir(fds))) {
            char link[600];
            int minor, taken;
            if (fd->d_name[0] == '.')
                continue;
            snprintf(link, sizeof link, "%s/%s", path, fd->d_name);
            ssize_t length = readlink(link, target, sizeof target - 1);
            if (length < 0)
                continue;
            target[length] = 0;
            if (sscanf(target, "/dev/nvidia%d%n", &minor, &taken) != 1 || target[taken])
                continue;
            for (int i = 0; i < gpu_count; i++)
                if (gpus[i].minor == minor)
                    seen[i] = 1;
        }
        if (fds)
            closedir(fds);
        for (int i = 0; i < gpu_count && process_count < MAX_PROCESSES; i++) {
            if (!seen[i])
                continue;
            struct process *process = &processes[process_count++];
            size_t length = 0;
            process->pid = atoi(entry->d_name);
            process->gpu = i;
            process->memory = 512;
            snprintf(process->name, sizeof process->name, "[Not Found]");
            snprintf(path, sizeof path, "/proc/%s/cmdline", entry->d_name);
            if ((text = read_file(path, NULL)) && *text)
                snprintf(process->name, sizeof process->name, "%s", text);
            free(text);
            snprintf(path, sizeof path, "/proc/%s/environ", entry->d_name);
            text = read_file(path, &length);
            for (char *at = text; at && at < text + length; at += strlen(at) + 1)
                if (!strncmp(at, "STANDIN_GPU_MEMORY_MIB=", 23))
                    process->memory = atol(at + 23);
            free(text);
        }
    }
    if (proc)
        closedir(proc);
}

static void format_memory(char **xml, const char *path, long mib) {
    char value[64];
    snprintf(value, sizeof value, "%ld MiB", mib);
    set_element(xml, path, value);
}

static void render(struct gpu *gpu) {
    char value[512], list[16384] = "\n";
    long total = atol(get(gpu, "memory_mib", "0")), reserved = total / 233, used = 0;
    gpu->xml = strdup(GPU_XML);
    for (int i = 0; i < process_count; i++) {
        if (processes[i].gpu != gpu->index)
            continue;
        used += processes[i].memory;
        size_t at = strlen(list);
        snprintf(list + at, sizeof list - at,
                 "\t\t\t<process_info>\n\t\t\t\t<gpu_instance_id>N/A</gpu_instance_id>\n"
                 "\t\t\t\t<compute_instance_id>N/A</compute_instance_id>\n\t\t\t\t<pid>%d</pid>\n\t\t\t\t<type>C</type>\n"
                 "\t\t\t\t<process_name>%s</process_name>\n\t\t\t\t<used_memory>%ld MiB</used_memory>\n\t\t\t</process_info>\n",
                 processes[i].pid, processes[i].name, processes[i].memory);
    }
    strncat(list, "\t\t", sizeof list - strlen(list) - 1);
    set_element(&gpu->xml, "processes", list);
    set_element(&gpu->xml, "product_name", get(gpu, "name", "NVIDIA H200"));
    set_element(&gpu->xml, "product_brand", get(gpu, "brand", "NVIDIA"));
    set_element(&gpu->xml, "product_architecture", get(gpu, "architecture", "Hopper"));
    set_element(&gpu->xml, "serial", get(gpu, "serial", "N/A"));
    set_element(&gpu->xml, "uuid", get(gpu, "uuid", ""));
    snprintf(value, sizeof value, "%d", gpu->minor);
    set_element(&gpu->xml, "minor_number", value);
    set_element(&gpu->xml, "gsp_firmware_version", strcmp(get(gpu, "gsp", "yes"), "yes") ? "N/A" : VERSION);
    const char *bdf = get(gpu, "bdf", "0000:00:00.0");
    snprintf(value, sizeof value, "%.2s", bdf + 5);
    set_element(&gpu->xml, "pci_bus", value);
    snprintf(value, sizeof value, "%.2s", bdf + 8);
    set_element(&gpu->xml, "pci_device", value);
    snprintf(value, sizeof value, "0000%s", bdf);
    for (char *c = value; *c; c++)
        *c = (char)toupper(*c);
    set_element(&gpu->xml, "pci_bus_id", value);
    snprintf(value, sizeof value, "%s10DE", get(gpu, "device_id", "2335"));
    set_element(&gpu->xml, "pci_device_id", value);
    format_memory(&gpu->xml, "fb_memory_usage/total", total);
    format_memory(&gpu->xml, "fb_memory_usage/reserved", reserved);
    format_memory(&gpu->xml, "fb_memory_usage/used", used);
    format_memory(&gpu->xml, "fb_memory_usage/free", total - reserved - used);
    if (!strcmp(get(gpu, "fabric", "no"), "yes")) {
        char path[256];
        snprintf(path, sizeof path, "%s/fabric", base);
        int completed = access(path, F_OK) == 0;
        set_element(&gpu->xml, "fabric/state", completed ? "Completed" : "In Progress");
        set_element(&gpu->xml, "fabric/status", completed ? "Success" : "N/A");
        if (completed) {
            set_element(&gpu->xml, "fabric/cliqueId", "0");
            set_element(&gpu->xml, "fabric/clusterUuid", "00000000-0000-0000-0000-000000000000");
        }
    }
    /* Elements that the older branches do not have or name otherwise. */
    if (BRANCH < 545)
        gpu->xml = replace_all(gpu->xml, "clocks_event_reason", "clocks_throttle_reason");
    if (BRANCH < 565)
        remove_element(&gpu->xml, "gpu_recovery_action");
    for (int i = 0; i < gpu->keys; i++)
        if (!strncmp(gpu->key[i], "xml.", 4))
            set_element(&gpu->xml, gpu->key[i] + 4, gpu->value[i]);
}

static void read_gpus(void) {
    char path[256], node[64];
    snprintf(path, sizeof path, "%s/gpus", base);
    char *text = read_file(path, NULL), *line, *rest = text;
    struct gpu *gpu = NULL;
    while (text && (line = strsep(&rest, "\n"))) {
        char *equals = strchr(line, '=');
        if (!strcmp(line, "gpu")) {
            if (gpu_count == MAX_GPUS)
                break;
            gpu = &gpus[gpu_count++];
        } else if (gpu && equals && gpu->keys < MAX_KEYS) {
            *equals = 0;
            gpu->key[gpu->keys] = line;
            gpu->value[gpu->keys++] = equals + 1;
        }
    }
    int kept = 0;
    for (int i = 0; i < gpu_count; i++) {
        gpus[i].minor = atoi(get(&gpus[i], "minor", "0"));
        snprintf(node, sizeof node, "/dev/nvidia%d", gpus[i].minor);
        /* A GPU whose node this container was not given does not exist here. */
        if (access(node, F_OK) == 0 && !strcmp(get(&gpus[i], "lost", "no"), "no")) {
            gpus[kept] = gpus[i];
            gpus[kept].index = kept;
            kept++;
        }
    }
    gpu_count = kept;
}

static const char *loaded_version(void) {
    static char version[64];
    static const char *bases[] = {"/proc/driver/nvidia-standin", "/run/nvidia-kernel/nvidia-standin"};
    for (int i = 0; i < 2; i++) {
        char path[256];
        snprintf(path, sizeof path, "%s/version", bases[i]);
        char *text = read_file(path, NULL);
        if (text) {
            base = bases[i];
            text[strcspn(text, "\n")] = 0;
            snprintf(version, sizeof version, "%s", text);
            free(text);
            return version;
        }
    }
    return NULL;
}

static void load_module(void) {
    if (geteuid() != 0 || access("/usr/bin/nvidia-modprobe", X_OK) != 0)
        return;
    pid_t child = fork();
    if (child == 0) {
        int null = open("/dev/null", O_RDWR);
        dup2(null, 1);
        dup2(null, 2);
        execl("/usr/bin/nvidia-modprobe", "nvidia-modprobe", "-u", (char *)NULL);
        _exit(127);
    }
    int status;
    if (child > 0)
        waitpid(child, &status, 0);
}

/* NVML's return codes are the exit codes of the program. */
static void initialise(void) {
    const char *loaded = loaded_version();
    if (!loaded) {
        load_module();
        loaded = loaded_version();
    }
    if (!loaded) {
        printf("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest "
               "NVIDIA driver is installed and running.\n\n");
        exit(9);
    }
    if (strcmp(loaded, VERSION)) {
        char short_version[32] = VERSION;
        char *last = strrchr(short_version, '.');
        if (last && strchr(short_version, '.') != last)
            *last = 0;
        printf("Failed to initialize NVML: Driver/library version mismatch\nNVML library version: %s\n", short_version);
        exit(18);
    }
    read_gpus();
    if (access("/dev/nvidiactl", F_OK) != 0) {
        printf("Failed to initialize NVML: Unknown Error\n");
        exit(255);
    }
    find_processes();
    for (int i = 0; i < gpu_count; i++)
        render(&gpus[i]);
    if (!gpu_count) {
        printf("No devices were found\n");
        exit(6);
    }
}

static int wanted(const struct gpu *gpu, const char *id) {
    char index[16];
    if (!id)
        return 1;
    snprintf(index, sizeof index, "%d", gpu->index);
    return !strcmp(id, index) || !strcmp(id, get(gpu, "uuid", "")) || !strcasecmp(id, text_of(gpu, "pci_bus_id")) ||
           !strcasecmp(id, get(gpu, "bdf", ""));
}

static const char *now(const char *format) {
    static char text[64];
    time_t seconds = time(NULL);
    struct tm local;
    localtime_r(&seconds, &local);
    strftime(text, sizeof text, format, &local);
    return text;
}

static void print_xml(const char *id) {
    printf("<?xml version=\"1.0\" ?>\n<!DOCTYPE nvidia_smi_log SYSTEM \"nvsmi_device_v%s.dtd\">\n<nvidia_smi_log>\n"
           "\t<timestamp>%s</timestamp>\n\t<driver_version>%s</driver_version>\n\t<cuda_version>%s</cuda_version>\n"
           "\t<attached_gpus>%d</attached_gpus>\n",
           BRANCH < 570 ? "12" : "13", now("%a %b %e %H:%M:%S %Y"), VERSION, CUDA, gpu_count);
    for (int i = 0; i < gpu_count; i++)
        if (wanted(&gpus[i], id))
            printf("\t<gpu id=\"%s\">\n%s\t</gpu>\n\n", text_of(&gpus[i], "pci_bus_id"), gpus[i].xml);
    printf("</nvidia_smi_log>\n");
}

/* The fields of --query-gpu that are known here: name, heading, element of the XML. */
static const char *FIELDS[][3] = {
    {"index", "index", "#index"},
    {"count", "count", "#count"},
    {"timestamp", "timestamp", "#timestamp"},
    {"driver_version", "driver_version", "#driver"},
    {"compute_cap", "compute_cap", "#compute_cap"},
    {"name", "name", "product_name"},
    {"gpu_name", "name", "product_name"},
    {"uuid", "uuid", "uuid"},
    {"gpu_uuid", "uuid", "uuid"},
    {"serial", "serial", "serial"},
    {"gpu_serial", "serial", "serial"},
    {"pci.bus_id", "pci.bus_id", "pci_bus_id"},
    {"gpu_bus_id", "pci.bus_id", "pci_bus_id"},
    {"pci.device_id", "pci.device_id", "pci_device_id"},
    {"vbios_version", "vbios_version", "vbios_version"},
    {"display_active", "display_active", "display_active"},
    {"persistence_mode", "persistence_mode", "persistence_mode"},
    {"pstate", "pstate", "performance_state"},
    {"memory.total", "memory.total [MiB]", "fb_memory_usage/total"},
    {"memory.reserved", "memory.reserved [MiB]", "fb_memory_usage/reserved"},
    {"memory.used", "memory.used [MiB]", "fb_memory_usage/used"},
    {"memory.free", "memory.free [MiB]", "fb_memory_usage/free"},
    {"compute_mode", "compute_mode", "compute_mode"},
    {"utilization.gpu", "utilization.gpu [%]", "utilization/gpu_util"},
    {"utilization.memory", "utilization.memory [%]", "utilization/memory_util"},
    {"ecc.mode.current", "ecc.mode.current", "ecc_mode/current_ecc"},
    {"ecc.mode.pending", "ecc.mode.pending", "ecc_mode/pending_ecc"},
    {"mig.mode.current", "mig.mode.current", "mig_mode/current_mig"},
    {"mig.mode.pending", "mig.mode.pending", "mig_mode/pending_mig"},
    {"temperature.gpu", "temperature.gpu", "temperature/gpu_temp"},
    {"power.draw", "power.draw [W]", "gpu_power_readings/instant_power_draw"},
    {"power.limit", "power.limit [W]", "gpu_power_readings/current_power_limit"},
    {"fabric.state", "fabric.state", "fabric/state"},
    {"fabric.status", "fabric.status", "fabric/status"},
    {"gsp.mode.current", "gsp.mode.current", "#gsp"},
    {NULL, NULL, NULL},
};

static const char *field_value(const struct gpu *gpu, const char *element_name, int units) {
    static char text[512];
    if (element_name[0] != '#') {
        snprintf(text, sizeof text, "%s", text_of(gpu, element_name));
        char *space = strrchr(text, ' ');
        if (space && (!strcmp(space, " MiB") || !strcmp(space, " W") || !strcmp(space, " %") || !strcmp(space, " C")))
            if (!units || !strcmp(space, " C"))
                *space = 0;
    } else if (!strcmp(element_name, "#index"))
        snprintf(text, sizeof text, "%d", gpu->index);
    else if (!strcmp(element_name, "#count"))
        snprintf(text, sizeof text, "%d", gpu_count);
    else if (!strcmp(element_name, "#timestamp"))
        snprintf(text, sizeof text, "%s.000", now("%Y/%m/%d %H:%M:%S"));
    else if (!strcmp(element_name, "#driver"))
        snprintf(text, sizeof text, "%s", VERSION);
    else if (!strcmp(element_name, "#compute_cap"))
        snprintf(text, sizeof text, "%s", get(gpu, "compute_cap", "N/A"));
    else
        snprintf(text, sizeof text, "%s", strcmp(get(gpu, "gsp", "yes"), "yes") ? "Disabled" : "Default");
    return text;
}

static char *trim(char *text) {
    while (*text == ' ')
        text++;
    for (size_t length = strlen(text); length && text[length - 1] == ' '; length--)
        text[length - 1] = 0;
    return text;
}

static int query_gpu(char *fields, const char *format, const char *id) {
    int chosen[64], count = 0, header = !strstr(format, "noheader"), units = !strstr(format, "nounits");
    for (char *field = strtok(fields, ","); field && count < 64; field = strtok(NULL, ",")) {
        int i = 0;
        field = trim(field);
        while (FIELDS[i][0] && strcasecmp(FIELDS[i][0], field))
            i++;
        if (!FIELDS[i][0]) {
            printf("Field \"%s\" is not a valid field to query.\n\n", field);
            return 2;
        }
        chosen[count++] = i;
    }
    if (header)
        for (int i = 0; i < count; i++) {
            char heading[64];
            snprintf(heading, sizeof heading, "%s", FIELDS[chosen[i]][1]);
            if (!units && strchr(heading, ' '))
                *strchr(heading, ' ') = 0;
            printf("%s%s", heading, i + 1 < count ? ", " : "\n");
        }
    for (int g = 0; g < gpu_count; g++)
        if (wanted(&gpus[g], id))
            for (int i = 0; i < count; i++)
                printf("%s%s", field_value(&gpus[g], FIELDS[chosen[i]][2], units), i + 1 < count ? ", " : "\n");
    return 0;
}

static int query_processes(char *fields, const char *format) {
    static const char *known[] = {"pid", "process_name", "name", "gpu_uuid", "gpu_name", "gpu_bus_id", "used_gpu_memory", "used_memory"};
    char *chosen[16];
    int count = 0, header = !strstr(format, "noheader"), units = !strstr(format, "nounits");
    for (char *field = strtok(fields, ","); field && count < 16; field = strtok(NULL, ",")) {
        int ok = 0;
        field = trim(field);
        for (size_t i = 0; i < sizeof known / sizeof *known; i++)
            ok |= !strcmp(known[i], field);
        if (!ok) {
            printf("Field \"%s\" is not a valid field to query.\n\n", field);
            return 2;
        }
        chosen[count++] = field;
    }
    for (int i = 0; header && i < count; i++)
        printf("%s%s%s", strcmp(chosen[i], "name") ? chosen[i] : "process_name", units && !strncmp(chosen[i], "used", 4) ? " [MiB]" : "",
               i + 1 < count ? ", " : "\n");
    for (int p = 0; p < process_count; p++)
        for (int i = 0; i < count; i++) {
            const struct gpu *gpu = &gpus[processes[p].gpu];
            if (!strcmp(chosen[i], "pid"))
                printf("%d", processes[p].pid);
            else if (!strncmp(chosen[i], "used", 4))
                printf("%ld%s", processes[p].memory, units ? " MiB" : "");
            else if (!strcmp(chosen[i], "gpu_uuid"))
                printf("%s", get(gpu, "uuid", ""));
            else if (!strcmp(chosen[i], "gpu_name"))
                printf("%s", get(gpu, "name", ""));
            else if (!strcmp(chosen[i], "gpu_bus_id"))
                printf("%s", text_of(gpu, "pci_bus_id"));
            else
                printf("%s", processes[p].name);
            printf("%s", i + 1 < count ? ", " : "\n");
        }
    return 0;
}

static void print_table(void) {
    printf("%s\n", now("%a %b %e %H:%M:%S %Y       "));
    printf("+-----------------------------------------------------------------------------------------+\n"
           "| NVIDIA-SMI %-22s Driver Version: %-14s CUDA Version: %-8s |\n"
           "+-----------------------------------------+------------------------+----------------------+\n"
           "| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |\n"
           "| Fan  Temp   Perf          Pwr:Usage/Cap |           Memory-Usage | GPU-Util  Compute M. |\n"
           "|                                         |                        |               MIG M. |\n"
           "|=========================================+========================+======================|\n",
           VERSION, VERSION, CUDA);
    for (int i = 0; i < gpu_count; i++) {
        char memory[64];
        snprintf(memory, sizeof memory, "%ldMiB / %ldMiB", atol(text_of(&gpus[i], "fb_memory_usage/used")),
                 atol(text_of(&gpus[i], "fb_memory_usage/total")));
        printf("| %3d  %-28.28s %4s  | %18s %3s | %20s |\n", i, get(&gpus[i], "name", ""),
               strcmp(text_of(&gpus[i], "persistence_mode"), "Enabled") ? "Off" : "On", text_of(&gpus[i], "pci_bus_id"), "Off", "0");
        printf("| N/A   47C    P0            129W /  700W | %22s | %7s %12s |\n", memory, "0%", text_of(&gpus[i], "compute_mode"));
        printf("|                                         |                        | %20s |\n"
               "+-----------------------------------------+------------------------+----------------------+\n",
               text_of(&gpus[i], "mig_mode/current_mig"));
    }
    printf("\n+-----------------------------------------------------------------------------------------+\n"
           "| Processes:                                                                              |\n"
           "|  GPU   GI   CI              PID   Type   Process name                        GPU Memory |\n"
           "|        ID   ID                                                               Usage      |\n"
           "|=========================================================================================|\n");
    for (int i = 0; i < process_count; i++)
        printf("| %4d   N/A  N/A %16d      C   %-36.36s%7ldMiB |\n", processes[i].gpu, processes[i].pid, processes[i].name, processes[i].memory);
    if (!process_count)
        printf("|  No running processes found                                                             |\n");
    printf("+-----------------------------------------------------------------------------------------+\n");
}

int main(int argc, char **argv) {
    int query = 0, xml = 0, list = 0, version = 0, persistence = 0;
    const char *id = NULL, *format = "";
    char *gpu_fields = NULL, *app_fields = NULL;
    for (int i = 1; i < argc; i++) {
        char *argument = argv[i], *next = i + 1 < argc ? argv[i + 1] : NULL;
        if (!strcmp(argument, "-q") || !strcmp(argument, "--query"))
            query = 1;
        else if (!strcmp(argument, "-x") || !strcmp(argument, "--xml-format"))
            xml = 1;
        else if (!strcmp(argument, "-L") || !strcmp(argument, "--list-gpus"))
            list = 1;
        else if (!strcmp(argument, "--version"))
            version = 1;
        else if (!strncmp(argument, "--query-gpu=", 12))
            gpu_fields = argument + 12;
        else if (!strncmp(argument, "--query-compute-apps=", 21))
            app_fields = argument + 21;
        else if (!strncmp(argument, "--format=", 9))
            format = argument + 9;
        else if (!strncmp(argument, "--id=", 5))
            id = argument + 5;
        else if (next && (!strcmp(argument, "-i") || !strcmp(argument, "--id")))
            id = next, i++;
        else if (next && (!strcmp(argument, "-pm") || !strcmp(argument, "--persistence-mode")))
            persistence = 1, i++;
        else {
            printf("Invalid combination of input arguments. Please run 'nvidia-smi -h' for help.\n\n");
            return 2;
        }
    }
    if ((gpu_fields || app_fields) && strncmp(format, "csv", 3)) {
        printf("\"--format=\" switch is missing. Please run 'nvidia-smi -h' for help.\n\n");
        return 2;
    }
    if (version) {
        /* The library and the program answer without the module; the driver's lines need it. */
        char short_version[32] = VERSION;
        char *last = strrchr(short_version, '.');
        if (last && strchr(short_version, '.') != last)
            *last = 0;
        const char *loaded = loaded_version();
        int up = loaded && !strcmp(loaded, VERSION);
        printf("NVIDIA-SMI version  : %s\nNVML version        : %s\nDRIVER version      : %s\nCUDA Version        : %s\n", VERSION,
               short_version, up ? VERSION : "Not Found", up ? CUDA : "Not Found");
        return 0;
    }
    initialise();
    if (id) {
        int found = 0;
        for (int i = 0; i < gpu_count; i++)
            found |= wanted(&gpus[i], id);
        if (!found) {
            printf("No devices were found\n");
            return 6;
        }
    }
    if (gpu_fields)
        return query_gpu(gpu_fields, format, id);
    if (app_fields)
        return query_processes(app_fields, format);
    if (list) {
        for (int i = 0; i < gpu_count; i++)
            if (wanted(&gpus[i], id))
                printf("GPU %d: %s (UUID: %s)\n", i, get(&gpus[i], "name", ""), get(&gpus[i], "uuid", ""));
    } else if (persistence)
        printf("Enabled persistence mode for all GPUs.\nAll done.\n");
    else if (xml || query)
        print_xml(id);
    else
        print_table();
    return 0;
}
