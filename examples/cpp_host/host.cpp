// The same from C++17: whatever is opened closes itself, whatever fails throws.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <array>
#include <chrono>
#include <cstdio>
#include <memory>
#include <random>
#include <stdexcept>

#include "modprop_fast.h"

namespace {

constexpr int steps = 1'000'000, test = 20'000, delay = 2;  // `test` steps at either end in which nothing is learned

struct Interpreter {
    explicit Interpreter(const char *python)
    {
        PyConfig config;
        PyConfig_InitPythonConfig(&config);
        PyStatus status = PyConfig_SetBytesString(&config, &config.program_name, python);
        if (!PyStatus_Exception(status))
            status = Py_InitializeFromConfig(&config);
        PyConfig_Clear(&config);
        if (PyStatus_Exception(status))
            throw std::runtime_error(status.err_msg ? status.err_msg : "Python does not start");
    }
    Interpreter(const Interpreter &) = delete;
    Interpreter &operator=(const Interpreter &) = delete;
    ~Interpreter() { Py_FinalizeEx(); }
};

class WithoutGil {
    PyThreadState *thread = PyEval_SaveThread();

public:
    WithoutGil() = default;
    WithoutGil(const WithoutGil &) = delete;
    WithoutGil &operator=(const WithoutGil &) = delete;
    ~WithoutGil() { PyEval_RestoreThread(thread); }
};

// Made after the interpreter, destroyed before it.
class Learner {
    const mpf_api *mpf;
    std::unique_ptr<mpf_learner, int (*)(mpf_learner *)> handle;

    void check(int code) const
    {
        if (code != MPF_OK)
            throw std::runtime_error(mpf->mpf_last_error());
    }

public:
    template <class Settings>
    Learner(const mpf_api *api, Settings settings) : mpf(api), handle(nullptr, api->mpf_destroy)
    {
        mpf_config config;
        check(mpf->mpf_defaults(&config, sizeof config));
        settings(config);
        mpf_learner *made;
        check(mpf->mpf_create(&config, &made));
        handle.reset(made);
    }

    template <std::size_t In, std::size_t Out>
    std::array<float, Out> step(const std::array<float, In> &x, const std::array<float, Out> &target, bool learn)
    {
        std::array<float, Out> y;
        check(mpf->mpf_step(handle.get(), x.data(), sizeof x, target.data(), sizeof target, learn, y.data(), sizeof y));
        return y;
    }

    double loss() const
    {
        double value;
        check(mpf->mpf_loss(handle.get(), &value));
        return value;
    }
};

// The program's own work: noise, and what it was `delay` steps before.
class Noise {
    std::minstd_rand generator{1};
    std::uniform_real_distribution<float> uniform{-1, 1};
    std::array<float, delay + 1> past{};

public:
    void step()
    {
        for (int i = delay; i > 0; i--)
            past[i] = past[i - 1];
        past[0] = uniform(generator);
    }
    std::array<float, 1> now() const { return {past[0]}; }
    std::array<float, 1> before() const { return {past[delay]}; }
};

template <class Body>
double seconds_per_step(Body body)
{
    const auto began = std::chrono::steady_clock::now();
    for (int t = 0; t < steps; t++)
        body(t);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count() / steps;
}

void simulate(const mpf_api *mpf)
{
    const std::array<std::ptrdiff_t, 2> counts{51, 13};
    Learner learner(mpf, [&](mpf_config &config) {
        config.mpf_n_in = 1, config.mpf_n_rec = 64, config.mpf_n_out = 1;
        config.mpf_n_types = counts.size(), config.mpf_type_counts = counts.data();
        config.mpf_activation = "tanh", config.mpf_tau = 1, config.mpf_rule = "modprop(mu=0.25)", config.mpf_lr = 0.003;
    });
    Noise noise;
    double before = 0, after = 0, sum = 0;
    const double alone = seconds_per_step([&](int) { noise.step(), sum += noise.before()[0]; });
    const double both = seconds_per_step([&](int t) {
        noise.step();
        learner.step(noise.now(), noise.before(), t >= test && t < steps - test);
        if (t < test)
            before += learner.loss() / test;
        if (t >= steps - test)
            after += learner.loss() / test;
    });
    std::printf("%d steps of 64 units without the GIL, mean input %.3f; guessing zero costs 0.167\n", steps, sum / steps);
    std::printf("error with learning off: before %.5f, after %.5f\n", before, after);
    std::printf("host step: %.3f us, with the engine: %.3f us\n", 1e6 * alone, 1e6 * both);
}

}  // namespace

// host PYTHON: the interpreter of the environment in which modprop_fast is installed.
int main(int argc, char **argv)
{
    try {
        Interpreter python(argc > 1 ? argv[1] : "python3");
        const auto *mpf = static_cast<const mpf_api *>(PyCapsule_Import(MPF_CAPSULE, 0));
        if (!mpf) {
            PyErr_Print();
            return 1;
        }
        if (!MPF_FITS(mpf))
            throw std::runtime_error("modprop_fast is older than the header of this program");
        WithoutGil without;
        simulate(mpf);
    } catch (const std::exception &error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
